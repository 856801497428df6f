"""The top share of tokens against reference data, on one device and on eight, and its rule by a plain sort."""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from infinicontext.objectives.selection import categories, count_of, in_basis_points, top_share
from infinicontext.sharding import MeshConfig, make_mesh

select = jax.jit(top_share, static_argnames="axes")


def cases(golden, kind):
    """Settings and arrays of the reference cases of one kind."""
    for case in json.loads((golden / "slm" / "cases.json").read_text())["cases"]:
        if case["kind"] == kind:
            with np.load(golden / "slm" / case["file"]) as file:
                yield case, dict(file)


@pytest.mark.golden
def test_how_many(golden):
    for n, ratio, k in json.loads((golden / "slm" / "cases.json").read_text())["k_table"]:
        assert count_of(jnp.int32(n), in_basis_points(ratio)) == k, (n, ratio)


@pytest.mark.golden
def test_reference_masks(golden):
    for case, arrays in cases(golden, "scores"):
        found = select(arrays["score"], arrays["valid"], in_basis_points(case["ratio"]))
        np.testing.assert_array_equal(found.mask, arrays["mask"], err_msg=case["name"])
        digest = hashlib.sha256(np.packbits(np.asarray(found.mask).ravel()).tobytes()).hexdigest()
        assert digest == case["mask_sha256"]
        assert (int(found.mask.sum()), int(found.candidates.sum())) == (case["k"], case["n"])
        key = int(np.float32(found.threshold.item()).view(np.uint32))
        assert (key ^ 0xFFFFFFFF if key >> 31 else key | 0x80000000) == case["threshold_key"]


@pytest.mark.golden
def test_devices_do_not_change_the_mask(golden):
    """Nor are scores gathered: of the batch's size there are no collectives."""
    mesh = make_mesh(MeshConfig(data=4, context=2))
    where = NamedSharding(mesh, P("data", "context"))
    for case, arrays in cases(golden, "scores"):
        arguments = [jax.device_put(arrays[name], where) for name in ("score", "valid")]
        compiled = select.lower(*arguments, in_basis_points(case["ratio"])).compile()
        np.testing.assert_array_equal(compiled(*arguments, in_basis_points(case["ratio"])).mask, arrays["mask"], err_msg=case["name"])
        assert "all-gather" not in compiled.as_text()


@pytest.mark.golden
def test_reference_categories(golden):
    for case, arrays in cases(golden, "categories"):
        found, change_K = categories(arrays["losses"], case["delta"])
        np.testing.assert_array_equal(found, arrays["category"])
        np.testing.assert_allclose(change_K, arrays["change"], rtol=1e-6, atol=1e-9)
        assert {name: int(np.sum(found == code)) for name, code in case["codes"].items()} == case["counts"]


scores = st.lists(st.sampled_from([-np.inf, -2.0, -0.0, 0.0, 1.0, 1.5, np.inf, np.nan]), min_size=24, max_size=24)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    score=scores, valid=st.lists(st.booleans(), min_size=24, max_size=24), points=st.integers(1, 10_000), axes=st.sampled_from([None, (1,)])
)
def test_the_rule(score, valid, points, axes):
    """By descending score, then by index; for the whole batch or for each row."""
    score_BT, valid_BT = np.float32(score).reshape(4, 6), np.array(valid).reshape(4, 6)
    found = select(score_BT, valid_BT, points, axes)
    candidates = valid_BT & np.isfinite(score_BT)
    np.testing.assert_array_equal(found.candidates, candidates)
    mask = np.zeros((4, 6), bool)
    for rows in np.split(np.arange(4), 1 if axes is None else 4):
        places = [(row, t) for row in rows for t in range(6) if candidates[row, t]]
        count = max(1, len(places) * points // 10_000) if places else 0
        for row, t in sorted(places, key=lambda at: (-score_BT[at], at))[:count]:
            mask[row, t] = True
    np.testing.assert_array_equal(found.mask, mask)
    groups = [(mask, score_BT)] if axes is None else list(zip(mask, score_BT))
    for threshold, (chosen, of_group) in zip(np.ravel(found.threshold), groups, strict=True):
        assert threshold == of_group[chosen].min() if chosen.any() else np.isnan(threshold)
    for tied, threshold, chosen, of_group, there in zip(
        np.ravel(found.tied),
        np.ravel(found.threshold),
        *(x[None] if axes is None else x for x in (mask, score_BT, candidates)),
        strict=True,
    ):
        equal = there & (of_group == threshold)
        assert tied == (equal.sum() if (equal & ~chosen).any() else 0)
