"""The attention kernels compile for a Hopper GPU, on a machine without one, and fit into it."""

import pytest

FEATURES = ("plain", "bias", "table", "Gaussian", "mask", "dropout")
# Bytes of registers that a kernel may spill into local memory. Heads wider than 128 in float32 spill whatever
# the tiles; they run where they are asked for, and `explain` says why they are not chosen.
ALLOWED = {
    ("float32", 256): 8192,
    ("float32", 128): 128,
    ("float32", 64): 16,
    ("bfloat16", 256): 16,
    ("bfloat16", 128): 16,
}
# The table's entries, each in some; the other features are slow.
SOME = {
    ("bfloat16", 64): ("dropout",),
    ("bfloat16", 128): ("bias",),
    ("bfloat16", 256): ("bias",),
    ("float32", 64): ("mask",),
    ("float32", 128): ("plain",),
}
CASES = [
    *((*kind, features) for kind, features in SOME.items()),
    ("bfloat16", 32, ("windows", "packed", "weights")),
    *(
        pytest.param(*kind, tuple(f for f in FEATURES if f not in features), marks=pytest.mark.slow)
        for kind, features in SOME.items()
    ),
    pytest.param("float16", 80, ("bias", "mask"), marks=pytest.mark.slow),
    pytest.param("bfloat16", 8, ("plain",), marks=pytest.mark.slow),
    pytest.param("float32", 256, ("bias",), marks=pytest.mark.slow),
    pytest.param("float64", 64, ("plain",), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("dtype", "dim", "features"), CASES)
def test_compiles_for_hopper(for_sm90, dtype, dim, features):
    compiled = for_sm90(
        "dot_product_attention.py",
        *(f"{dtype}-{dim}-{feature}" for feature in features),
        spilled=ALLOWED.get((dtype, dim), 0),
    )
    for feature in features:
        names = [k["kernel"] for k in compiled if k["case"].endswith(f"-{feature}")]
        own = ["bias_kernel"] if feature in ("bias", "table", "windows") else []
        expected = ["forward_kernel", "query_kernel", "key_kernel", *own]
        assert names == (["forward_kernel", "weights_kernel"] if feature == "weights" else expected)
    for kernel in compiled:
        assert kernel["atomics"] == 0, kernel  # every run gives the same
        assert dtype == "float64" or kernel["tensor_cores"] > 0, kernel
        # No warp makes what another does; but for what spills whatever the tiles, and is not chosen.
        assert kernel["repeated"] == 1 or (dtype, dim) == ("float32", 256), kernel


def test_twenty_lengths_compile_few_kernels(for_sm90):
    compiled = for_sm90("dot_product_attention.py", "twenty lengths")
    for name in ("forward_kernel", "query_kernel", "key_kernel"):
        of_kernel = [k["hash"] for k in compiled if k["kernel"] == name]
        assert len(of_kernel) == 20
        assert len(set(of_kernel)) <= 4  # numbers that sixteen divides, or does not
