# SPDX-License-Identifier: Apache-2.0
"""What the text of a compiled program is read for: collectives and loops."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from dcae_jax import config as config_lib
from dcae_jax.planner import hlo
from dcae_jax.runtime import mesh as mesh_lib


def _compiled(unroll):
    """Five rounds of an all-reduce of 4 KiB over eight devices, with a product in between."""
    mesh = mesh_lib.make_mesh(config_lib.default().mesh)

    def rounds(x, weights):
        def body(carry, w):
            return jax.lax.psum(jnp.tanh(carry @ w), "data"), None

        return jax.lax.scan(body, x, weights, unroll=unroll)[0]

    f = jax.shard_map(rounds, mesh=mesh, in_specs=(P(), P()), out_specs=P(), check_vma=False)
    x = jax.ShapeDtypeStruct((32, 32), jnp.float32)
    return jax.jit(f).lower(x, jax.ShapeDtypeStruct((5, 32, 32), jnp.float32)).compile()


def test_collectives_in_a_loop_count_as_often_as_it_turns():
    """Catches a scanned transformer whose traffic is reported as that of one layer."""
    looped, flat = (hlo.collective_bytes(_compiled(u).as_text()) for u in (1, True))
    assert looped == flat == {"all-reduce": {"count": 5, "bytes": 5 * 4096}}


def test_loops_access_memory_in_every_round():
    """Catches bytes of one layer taken for those of all, and whole stacks counted per slice."""
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


# As XLA for TPUs writes a `scan`: no trip count, the rounds stand in the condition alone.
_TPU_LOOP = """HloModule m

%body (state: (s32[], f32[16], f32[7,16])) -> (s32[], f32[16], f32[7,16]) {
  %state = (s32[]{:T(128)}, f32[16]{0:T(128)}, f32[7,16]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %x = f32[16]{0:T(128)} get-tuple-element(%state), index=1
  %w = f32[7,16]{1,0:T(8,128)} get-tuple-element(%state), index=2
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  %y = f32[16]{0:T(128)} all-reduce(%x), to_apply=%sum
  ROOT %out = (s32[]{:T(128)}, f32[16]{0:T(128)}, f32[7,16]{1,0:T(8,128)}) tuple(%next, %y, %w)
}

%until (state.1: (s32[], f32[16], f32[7,16])) -> pred[] {
  %bound = s32[]{:T(128)} constant(7), metadata={op_name="jit(f)/while/cond"}
  %state.1 = (s32[]{:T(128)}, f32[16]{0:T(128)}, f32[7,16]{1,0:T(8,128)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%j, %bound), direction=LT, metadata={op_name="lt"}
}

ENTRY %main (p: (s32[], f32[16], f32[7,16])) -> (s32[], f32[16], f32[7,16]) {
  %p = (s32[]{:T(128)}, f32[16]{0:T(128)}, f32[7,16]{1,0:T(8,128)}) parameter(0)
  ROOT %loop = (s32[]{:T(128)}, f32[16]{0}, f32[7,16]{1,0}) while(%p), condition=%until, body=%body
}
"""


def test_the_rounds_of_a_tpu_loop_are_those_of_its_condition():
    """Catches TPU loops counted once, since their text has no trip count as a CPU's has."""
    assert hlo.collective_bytes(_TPU_LOOP) == {"all-reduce": {"count": 7, "bytes": 7 * 64}}
    a_round = 2 * 64 + 3 * 4 + (2 * 4 + 1)  # all-reduce, addition and comparison
    assert hlo.repeated_bytes(_TPU_LOOP) == 6 * a_round


def test_a_loop_without_a_fixed_bound_counts_once():
    """Catches a count made up for a loop that ends as the data say."""
    for old, new in (("LT", "NE"), ("%bound)", "%j)"), ("constant(7)", "copy(%state.1)")):
        text = _TPU_LOOP.replace(old, new)
        assert text != _TPU_LOOP
        assert hlo.collective_bytes(text)["all-reduce"]["count"] == 1, new
        assert hlo.repeated_bytes(text) == 0, new


def test_fusions_within_fusions_read_and_write_slices():
    """Catches a stack of all layers counted in each round, where a fusion slices it inside."""
    text = """HloModule m

%slice (stack: f32[7,16], i: s32[]) -> f32[16] {
  %stack = f32[7,16]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %row = f32[1,16]{1,0} dynamic-slice(%stack, %i), dynamic_slice_sizes={1,16}
  ROOT %flat = f32[16]{0} bitcast(%row)
}

%outer (stack.1: f32[7,16], i.1: s32[], whole: f32[16], into: f32[7,16]) -> f32[7,16] {
  %stack.1 = f32[7,16]{1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  %whole = f32[16]{0} parameter(2)
  %into = f32[7,16]{1,0} parameter(3)
  %part = f32[16]{0} fusion(%stack.1, %i.1), kind=kLoop, calls=%slice
  %sum = f32[16]{0} add(%part, %whole)
  %update = f32[1,16]{1,0} bitcast(%sum)
  %flat.1 = f32[7,16]{1,0} bitcast(%into)
  ROOT %updated = f32[7,16]{1,0} dynamic-update-slice(%flat.1, %update, %i.1)
}

ENTRY %main (a: f32[7,16], b: s32[], c: f32[16], d: f32[7,16]) -> f32[7,16] {
  %a = f32[7,16]{1,0} parameter(0)
  %b = s32[] parameter(1)
  %c = f32[16]{0} parameter(2)
  %d = f32[7,16]{1,0} parameter(3)
  %room = f32[7,16]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %p = (f32[16]{0}, f32[16]{0}, u32[]) collective-permute-start(%c)
  ROOT %f = f32[7,16]{1,0} fusion(%a, %b, %c, %d), kind=kOutput, calls=%outer
}
"""
    bodies = hlo._computations(text)
    fusion = 64 + 4 + 64 + 64  # slice, index, whole operand, update
    assert hlo.accessed_bytes(bodies, "") == fusion + 64 + 64 + 4


def test_bytes_are_counted_as_xla_counts_them():
    """Catches a count of loops that is of another kind than the count it is added to."""
    program = _compiled(True)
    bodies = hlo._computations(program.as_text())
    mine = hlo.accessed_bytes(bodies, "")
    assert mine == pytest.approx(program.cost_analysis()["bytes accessed"], rel=0.2)
