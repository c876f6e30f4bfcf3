"""A model's tree of modules against trees written by hand, and the count of operations against formulas."""

import pytest
import torch
from lamina.layers import MultiHeadAttention
from lamina.viz import ModuleRow, count_flops, module_tree
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))
        self.linear = nn.Linear(dim, dim)
        self.nothing = nn.Identity()
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.linear(self.nothing(x))) * self.scale


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 5)
        self.blocks = nn.Sequential(Block(5), Block(5), Block(5))
        self.lstm = nn.LSTM(5, 7, batch_first=True)
        self.spare = nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(self.blocks(self.stem(x)))[0]


def rows(tree: ModuleRow) -> dict[str, ModuleRow]:
    return {row.name: row for row in tree.children}


def test_a_tree_by_hand():
    inner = (
        ModuleRow("scale", "Parameter", ((5,),), 5),
        ModuleRow("linear", "Linear", ((2, 11, 5),), 30),
        ModuleRow("act", "ReLU", ((2, 11, 5),), 0),
    )
    recurrent = 4 * 7 * (5 + 7 + 2)
    assert module_tree(Model(), [torch.randn(2, 11, 3)]) == ModuleRow(
        "",
        "Model",
        ((2, 11, 7),),
        20 + 3 * 35 + recurrent + 16,
        (
            ModuleRow("stem", "Linear", ((2, 11, 5),), 20),
            ModuleRow(
                "blocks",
                "Sequential",
                ((2, 11, 5),),
                3 * 35,
                (ModuleRow("0-2", "Block", ((2, 11, 5),), 35, inner, repeats=3),),
            ),
            ModuleRow("lstm", "LSTM", ((2, 11, 7), (1, 2, 7), (1, 2, 7)), recurrent),
            ModuleRow("spare", "Linear", (), 16),  # never called
        ),
    )


def test_only_equal_neighbours_are_joined():
    model = nn.Sequential(
        nn.Linear(3, 3), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
    )
    tree = module_tree(model, [torch.randn(2, 3)])
    assert [(row.name, row.repeats, row.parameters) for row in tree.children] == [
        ("0-1", 2, 12),
        ("2", 1, 0),
        ("3", 1, 12),
        ("4", 1, 9),
    ]


def test_neighbours_of_other_shapes_are_not_joined():
    model = nn.Sequential(nn.MaxPool1d(2), nn.MaxPool1d(2), nn.ReLU(), nn.ReLU())
    tree = module_tree(model, [torch.randn(2, 3, 16)])
    assert [(row.name, row.output) for row in tree.children] == [
        ("0", ((2, 3, 8),)),
        ("1", ((2, 3, 4),)),
        ("2-3", ((2, 3, 4),)),
    ]


def test_named_neighbours_are_not_joined():
    """The projections of an attention are alike, and yet not a run."""
    tree = module_tree(MultiHeadAttention(6, num_heads=2), [torch.randn(2, 3, 6)])
    assert list(rows(tree)) == ["query", "key", "value", "out"]


def test_shared_parameters_count_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    tree = module_tree(model, [torch.randn(2, 3)])
    assert tree.parameters == 9 + 3 + 3
    assert rows(tree)["0"].parameters == rows(tree)["2"].parameters == 12


def test_a_module_called_twice_shows_its_first_shape():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.Tanh()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.act(x)[:1])

    assert rows(module_tree(Twice(), [torch.randn(2, 3)]))["act"].output == ((2, 3),)


def test_nothing_is_left_behind():
    model, modes = Model().train(), []
    model.stem.eval()  # a frozen part of a model in training stays so
    model.blocks.register_forward_pre_hook(
        lambda module, args: modes.append((module.training, torch.is_grad_enabled()))
    )
    module_tree(model, [torch.randn(2, 11, 3)])
    assert modes == [(False, False)]
    assert [model.training, model.stem.training, model.blocks[1].training] == [True, False, True]
    assert torch.is_grad_enabled()
    with pytest.raises(RuntimeError):
        module_tree(model, [torch.randn(2, 11, 13)])
    assert [model.training, model.stem.training] == [True, False]
    assert sum(len(module._forward_hooks) for module in model.modules()) == 0


def test_flops():
    B, L = 2, 11
    model, inputs = Model().to("meta"), [torch.randn(B, L, 3, device="meta")]
    products = 3 * 5 + 3 * 5 * 5 + 4 * 7 * (5 + 7)
    assert count_flops(model, inputs) == 2 * B * L * products
    assert model.training


def test_flops_of_attention():
    B, L, C = 2, 11, 6
    attention = MultiHeadAttention(C, num_heads=3, device="meta")
    flops = count_flops(attention, [torch.randn(B, L, C, device="meta")])
    assert flops == 2 * B * (4 * L * C * C + 2 * L * L * C)


def test_flops_are_counted_on_meta_only():
    with pytest.raises(ValueError, match="model and inputs must be on the meta device, got a tensor on cpu"):
        count_flops(Model(), [torch.randn(2, 11, 3, device="meta")])
    with pytest.raises(ValueError, match="got a tensor on cpu"):
        count_flops(Model().to("meta"), [torch.randn(2, 11, 3)])
