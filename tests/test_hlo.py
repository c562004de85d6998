# SPDX-License-Identifier: Apache-2.0
"""What the text of a compiled program is read for: collectives and loops."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from dcae_jax import config as config_lib
from dcae_jax import hlo, sharding


def _compiled(unroll):
    """Five rounds of an all-reduce of 4 KiB over eight devices, with a product in between."""
    mesh = sharding.make_mesh(config_lib.default().mesh)

    def rounds(x, weights):
        def body(carry, w):
            return jax.lax.psum(jnp.tanh(carry @ w), "data"), None

        return jax.lax.scan(body, x, weights, unroll=unroll)[0]

    f = jax.shard_map(rounds, mesh=mesh, in_specs=(P(), P()), out_specs=P(), check_vma=False)
    x = jax.ShapeDtypeStruct((32, 32), jnp.float32)
    return jax.jit(f).lower(x, jax.ShapeDtypeStruct((5, 32, 32), jnp.float32)).compile()


def test_collectives_in_a_loop_count_as_often_as_it_turns():
    """Catches a scanned transformer whose traffic is told as that of one layer."""
    looped, flat = (hlo.collective_bytes(_compiled(u).as_text()) for u in (1, True))
    assert looped == flat == {"all-reduce": {"count": 5, "bytes": 5 * 4096}}


def test_loops_access_memory_in_every_round():
    """Catches bytes of one layer told as those of all, and whole stacks counted for each slice."""
    looped, flat = _compiled(1), _compiled(True)
    once = looped.cost_analysis()["bytes accessed"]
    more = hlo.repeated_bytes(looped.as_text())
    assert hlo.repeated_bytes(flat.as_text()) == 0
    assert once + more == pytest.approx(flat.cost_analysis()["bytes accessed"], rel=0.5)
    assert more > 2 * once / 3


def test_each_form_of_a_collective_is_read():
    """Catches an asynchronous collective counted twice, or with its operands as its result."""
    text = """HloModule m

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %main (p: bf16[4,8], q: f32[16]) -> f32[4] {
  %p = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %q = f32[16]{0} parameter(1)
  %g = (bf16[4,8]{1,0}, bf16[16,8]{1,0:T(8,128)(2,1)S(1)}) all-gather-start(%p), dimensions={0}
  %gd = bf16[16,8]{1,0} all-gather-done(%g)
  %r = (f32[16]{0}, f32[16]{0}) all-reduce(%q, %q), to_apply=%add
  %c = (f32[16]{0}, f32[16]{0}, u32[], u32[]) collective-permute-start(%q)
  %cd = f32[16]{0} collective-permute-done(%c)
  ROOT %s = f32[4]{0} reduce-scatter(%q), dimensions={0}, to_apply=%add
}
"""
    assert hlo.collective_bytes(text) == {
        "all-gather": {"count": 1, "bytes": 16 * 8 * 2},
        "all-reduce": {"count": 1, "bytes": 2 * 16 * 4},
        "collective-permute": {"count": 1, "bytes": 16 * 4 + 8},
        "reduce-scatter": {"count": 1, "bytes": 16 * 4},
    }
