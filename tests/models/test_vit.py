"""The Vision Transformer: the paper's sizes, transformers' model with the same weights, any image size."""

import pytest
import torch
from lamina.models import ViT, ViTConfig, create_model
from torch import Tensor, nn

# Counted on the authors' architecture: with a classifier of 1000 classes, and without.
COUNTS = {
    "vit_tiny_patch16_224": (5_717_416, 5_524_416),
    "vit_small_patch16_224": (22_050_664, 21_665_664),
    "vit_base_patch16_224": (86_567_656, 85_798_656),
    "vit_base_patch32_224": (88_224_232, 87_455_232),
    "vit_large_patch16_224": (304_326_632, 303_301_632),
    "vit_huge_patch14_224": (632_045_800, 630_764_800),
    "vit_base_patch16_384": (86_859_496, None),
    "vit_base_r50_patch16_224": (None, 97_890_112),
}
SMALL = ViTConfig(
    image_size=(12, 8),
    patch_size=(4, 2),
    in_channels=3,
    num_classes=5,
    dim=12,
    depth=2,
    num_heads=3,
    hidden_dim=7,
)


def randomised(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize(("name", "counts"), COUNTS.items(), ids=COUNTS)
def test_parameters_are_as_many_as_the_paper_s(name, counts):
    with_head, without = counts
    if with_head is not None:
        assert create_model(name, device="meta").num_parameters() == with_head
    if without is not None:
        assert create_model(name, device="meta", num_classes=0).num_parameters() == without


def test_equals_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=(12, 8),
        patch_size=(4, 2),
        num_channels=3,
        num_labels=5,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=7,
        layer_norm_eps=1e-6,
        hidden_act="gelu",
    )
    theirs = randomised(transformers.ViTForImageClassification(config).double())
    ours = ViT(SMALL, dtype=torch.float64).eval()
    ours.load_state_dict(from_transformers(theirs.state_dict()))
    images, cotangent = torch.randn(2, 3, 12, 8).double().requires_grad_(), torch.randn(2, 5).double()
    expected, actual = theirs(images).logits, ours(images)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, images, cotangent), torch.autograd.grad(expected, images, cotangent)
    )
    hidden = theirs.vit(images).last_hidden_state
    torch.testing.assert_close(ours.tokens(images), hidden)


def from_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names, which moved between its versions, onto ours."""
    positions = state["vit.embeddings.position_embeddings"][0]
    ours = {
        "class_token.weight": state["vit.embeddings.cls_token"][0],
        "positions.prefix": positions[:1],
        "positions.weight": positions[1:],
        "patches.weight": state["vit.embeddings.patch_embeddings.projection.weight"],
        "patches.bias": state["vit.embeddings.patch_embeddings.projection.bias"],
    }
    renamed = [
        ("attention.attention.query", "attention.query"),
        ("attention.attention.key", "attention.key"),
        ("attention.attention.value", "attention.value"),
        ("attention.q_proj", "attention.query"),
        ("attention.k_proj", "attention.key"),
        ("attention.v_proj", "attention.value"),
        ("attention.o_proj", "attention.out"),
        ("attention.output.dense", "attention.out"),
        ("intermediate.dense", "feed_forward.up"),
        ("mlp.fc1", "feed_forward.up"),
        ("mlp.fc2", "feed_forward.down"),
        ("output.dense", "feed_forward.down"),
        ("layernorm_before", "attention_norm"),
        ("layernorm_after", "feed_forward_norm"),
        ("vit.layers.", "encoder.blocks."),
        ("vit.encoder.layer.", "encoder.blocks."),
        ("vit.layernorm.", "encoder.norm."),
        ("classifier.", "head."),
    ]
    for name, value in state.items():
        if "embeddings" not in name:
            for old, new in renamed:
                name = name.replace(old, new)
            ours[name] = value
    return ours


def test_blocks_equal_torch_s_encoder():
    """An independent check that needs torch alone: PyTorch's pre-norm encoder on the same tokens."""
    model = randomised(ViT(SMALL, dtype=torch.float64))
    layer = nn.TransformerEncoderLayer(
        12, 3, 7, 0.0, "gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True, dtype=torch.float64
    )
    tokens = torch.randn(2, 13, 12).double()
    block = model.encoder.blocks[0]
    parts = block.attention.query, block.attention.key, block.attention.value
    layer.load_state_dict(
        {
            "self_attn.in_proj_weight": torch.cat([p.weight for p in parts]),
            "self_attn.in_proj_bias": torch.cat([p.bias for p in parts]),
            "self_attn.out_proj.weight": block.attention.out.weight,
            "self_attn.out_proj.bias": block.attention.out.bias,
            "linear1.weight": block.feed_forward.up.weight,
            "linear1.bias": block.feed_forward.up.bias,
            "linear2.weight": block.feed_forward.down.weight,
            "linear2.bias": block.feed_forward.down.bias,
            "norm1.weight": block.attention_norm.weight,
            "norm1.bias": block.attention_norm.bias,
            "norm2.weight": block.feed_forward_norm.weight,
            "norm2.bias": block.feed_forward_norm.bias,
        }
    )
    torch.testing.assert_close(block(tokens), layer(tokens))


def test_logits_come_from_the_class_token_or_the_mean():
    by_class = randomised(ViT(SMALL))
    images = torch.randn(2, 3, 12, 8)
    tokens = by_class.tokens(images)
    assert tokens.shape == (2, 1 + 3 * 4, 12)
    torch.testing.assert_close(by_class(images), by_class.head(tokens[:, 0]))
    by_mean = randomised(create_model("vit_digits", pool="mean", representation_dim=11))
    images = torch.randn(2, 1, 8, 8)
    tokens = by_mean.tokens(images)
    assert tokens.shape == (2, 16, 64)
    hidden = torch.tanh(by_mean.representation[0](tokens.mean(1)))
    torch.testing.assert_close(by_mean(images), by_mean.head(hidden))


def test_without_classes_it_gives_features():
    model = create_model("vit_digits", num_classes=0).eval()
    images = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(model(images), model.tokens(images)[:, 0])


@pytest.mark.parametrize("size", [(12, 8), (24, 16), (8, 20), (13, 7)])
def test_takes_images_of_any_size(size):
    model = randomised(ViT(SMALL))
    images = torch.randn(2, 3, *size)
    rows, cols = -(-size[0] // 4), -(-size[1] // 2)
    assert model.grid(*size) == (rows, cols)
    assert model.tokens(images).shape == (2, 1 + rows * cols, 12)
    assert model(images).shape == (2, 5)


def test_a_hybrid_cuts_its_patches_from_a_resnet():
    model = create_model("vit_digits", patch_size=1, backbone_depths=(1, 1), image_size=(16, 24), dim=16)
    images = torch.randn(2, 1, 16, 24)
    assert model.grid(16, 24) == (2, 3)
    assert model.tokens(images).shape == (2, 1 + 6, 16)
    assert model(torch.randn(2, 1, 17, 9)).shape == (2, 10)
    state = ViT(model.config).state_dict()
    assert {name for name in state if name.startswith("backbone.")}


def test_another_size_interpolates_the_positions():
    """With patches that are all alike, only the positions can tell two places apart."""
    model = randomised(ViT(SMALL))
    nn.init.zeros_(model.patches.weight)
    tokens = torch.zeros(1, 1 + 6 * 8, 12)
    expected = model.positions(tokens, grid=(6, 8))
    seen = []
    model.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(torch.randn(1, 3, 24, 16))
    expected[:, 0] += model.class_token.weight[0]
    expected[:, 1:] += model.patches.bias
    torch.testing.assert_close(seen[0], expected)


def test_starts_as_the_authors_do():
    model = create_model("vit_digits", position_std=ViTConfig().position_std)
    assert (model.class_token.weight == 0).all()
    assert (model.head.weight == 0).all()
    assert (model.head.bias == 0).all()
    assert model.positions.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert create_model("vit_digits", position_std=0.7).positions.weight.std().item() == pytest.approx(
        0.7, rel=0.2
    )
    up = model.encoder.blocks[0].feed_forward.up
    bound = (6 / (64 + 128)) ** 0.5
    assert up.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert 0 < up.bias.std() < 1e-5


def test_dropout_and_drop_path_reach_every_block():
    model = create_model("vit_digits", dropout=0.1, drop_path=0.3)
    rates = [block.drop_path.probability for block in model.encoder.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.1}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"pool": "max"}, "pool must be 'cls' or 'mean', got 'max'"),
        ({"activation": "silu"}, "activation must be one of gelu, gelu_tanh, relu, got 'silu'"),
        ({"dim": 10}, "num_heads must divide dim, got dim=10 and num_heads=4"),
    ],
)
def test_bad_settings_are_named(setting, message):
    with pytest.raises(ValueError, match=message):
        create_model("vit_digits", **setting)
