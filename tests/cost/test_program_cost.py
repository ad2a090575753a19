"""Costs read from a compiled program, compared with known values and with XLA's own counts."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jaxcl.cost.program_cost import matrix_flops, traffic
from jaxcl.ops.mesh import make_mesh


def layers(x, w):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0].sum()


def products(function, *arguments):
    return matrix_flops(jax.make_jaxpr(function)(*arguments))


X, W = jnp.ones((8, 16)), jnp.ones((6, 16, 16))
ONE = 2 * 8 * 16 * 16


def test_products_count_as_often_as_they_run():
    assert products(layers, X, W) == 6 * ONE
    assert products(jax.grad(layers, (0, 1)), X, W) == 3 * 6 * ONE
    assert products(jax.grad(jax.checkpoint(layers), (0, 1)), X, W) == 4 * 6 * ONE
    assert (
        products(lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ W[0], lambda x: x, x), X) == ONE
    )


@pytest.mark.parametrize(
    ("axes", "count"),
    [
        ({"data", "fsdp"}, 2),  # rows over four devices, replicated over two
        ({"data"}, 1),  # the compiler divides it over the other axis
    ],
)
def test_products_inside_of_a_shard_map_count_on_each_device(axes, count):
    inside = jax.shard_map(
        lambda x: x @ W[0],
        mesh=make_mesh({"data": 4, "fsdp": 2}),
        in_specs=P("data"),
        out_specs=P("data"),
        axis_names=axes,
    )
    assert products(inside, X) == count * ONE


def compiled(function, *arguments):
    return jax.jit(function).lower(*arguments).compile()


def test_memory_traffic_is_xlas_own_where_there_is_no_loop():
    program = compiled(lambda x, w: jnp.tanh(jnp.tanh(x @ w[0]) @ w[1]).sum(), X, W)
    accessed = program.cost_analysis()["bytes accessed"]
    assert traffic(program.as_text()).memory == pytest.approx(accessed, rel=0.05)


def test_memory_traffic_grows_with_the_loop_and_not_with_the_sliced_array():
    few, many = (
        traffic(compiled(layers, X, jnp.ones((n, 16, 16))).as_text()).memory for n in (10, 1_000)
    )
    assert 60 * few < many < 110 * few


@pytest.mark.parametrize("collective", ["psum", "all_gather", "psum_scatter", "ppermute"])
def test_collectives_receive_the_bytes_of_a_ring(collective):
    mesh = make_mesh({"data": 8})
    received = {  # for [8, 4] float32 on each of 8 devices
        "psum": 2 * 7 / 8 * 128,
        "all_gather": 7 * 128,
        "psum_scatter": 7 / 8 * 128,
        "ppermute": 128,
    }

    def local(x):
        if collective == "psum":
            return jax.lax.psum(x, "data")
        if collective == "all_gather":
            return jax.lax.all_gather(x, "data", tiled=True)
        if collective == "psum_scatter":
            return jax.lax.psum_scatter(x, "data", tiled=True)
        return jax.lax.ppermute(x, "data", [(i, (i + 1) % 8) for i in range(8)])

    out = P() if collective == "psum" else P("data")
    program = compiled(
        jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=out), jnp.ones((64, 4))
    )
    assert traffic(program.as_text()).interconnect == received[collective]


def test_a_ring_in_a_loop_counts_every_turn():
    mesh = make_mesh({"data": 8})
    turn = [(i, (i + 1) % 8) for i in range(8)]

    def local(x):
        return jax.lax.fori_loop(0, 7, lambda _, x: jax.lax.ppermute(jnp.sin(x), "data", turn), x)

    program = compiled(
        jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P("data")), jnp.ones((64, 4))
    )
    assert traffic(program.as_text()).interconnect == 7 * 128


def test_started_collectives_and_on_chip_memory_are_read_off_the_text():
    program = """
HloModule step

%bound (p: (s32[], f32[4])) -> pred[] {
  %p = (s32[], f32[4]{0}) parameter(0)
  %n = s32[] constant(15)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%turn (p.1: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p.1 = (s32[], f32[4]{0}) parameter(0)
  %x = f32[4]{0:T(128)S(1)} get-tuple-element(%p.1), index=1
  %go = (f32[4]{0}, f32[4]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x)
  %gone = f32[4]{0} collective-permute-done(%go)
  ROOT %t = (s32[], f32[4]{0}) tuple(%x, %gone)
}

%scatter (b: f32[4,4]) -> f32[2,4] {
  %b = f32[4,4]{1,0} parameter(0)
  ROOT %part = f32[2,4]{1,0} reduce-scatter(%b), replica_groups={{0,1},{2,3}}
}

ENTRY %main (a: f32[2,4]) -> f32[16,4] {
  %a = f32[2,4]{1,0} parameter(0)
  %loop = (s32[], f32[4]{0}) while(%a), condition=%bound, body=%turn
  %all = (f32[2,4]{1,0}, f32[16,4]{1,0}) all-gather-start(%a), replica_groups=[2,8]<=[16]
  %chip = bf16[1024]{0:T(1024)S(1)} broadcast(%a)
  %far = (f32[2,4]{1,0}, f32[2,4]{1,0}) collective-permute-start(%a)
  %begun = ((f32[2,4]{1,0}), f32[2,4]{1,0}) async-start(%a), calls=%scatter
  %ended = f32[2,4]{1,0} async-done(%begun), calls=%scatter
  ROOT %done = f32[16,4]{1,0} all-gather-done(%all)
}
"""
    found = traffic(program)
    assert found.interconnect == 15 * 16 + 7 / 8 * 256 + 32 + 32
    assert found.memory == 15 * (2 * 16) + 32 + 256 + 32 + 2 * 32 + 2 * 32


def test_a_collective_in_the_background_of_several_fusions_counts_once():
    program = """
HloModule step

%begin (p: f32[2,4]) -> (f32[2,4], f32[16,4], MARK) {
  %p = f32[2,4] parameter(0)
  %g = f32[16,4] all-gather(%p), channel_id=5, GROUPS, chain_id="1"
  ROOT %s = (f32[2,4], f32[16,4], MARK) custom-call(%g), target="AsyncCollectiveStart"
}

%amid (p.1: f32[2,4], b.1: f32[16,4], m: MARK, x.1: f32[8]) -> (f32[8], …) {
  %p.1 = f32[2,4] parameter(0)
  %b.1 = f32[16,4] parameter(1)
  %m = MARK parameter(2)
  %x.1 = f32[8] parameter(3)
  %sine = f32[8] sine(%x.1)
  %g.1 = f32[16,4] all-gather(%p.1), channel_id=5, GROUPS, chain_id="1"
  ROOT %both = (f32[8], f32[2,4], f32[16,4], f32[16,4], MARK) tuple(%sine, %p.1, %b.1, %g.1, %m)
}

%finish (p.2: f32[2,4], b.2: f32[16,4]) -> f32[16,4] {
  %p.2 = f32[2,4] parameter(0)
  %b.2 = f32[16,4] parameter(1)
  %g.2 = f32[16,4] all-gather(%p.2), channel_id=5, GROUPS, chain_id="1"
  ROOT %e = f32[16,4] custom-call(%p.2, %b.2, %g.2), target="AsyncCollectiveDone"
}

%other (p.3: f32[2,4]) -> f32[16,4] {
  %p.3 = f32[2,4] parameter(0)
  ROOT %g.3 = f32[16,4] all-gather(%p.3), channel_id=6, GROUPS
}

%bound (c: (s32[], f32[2,4])) -> pred[] {
  %c = (s32[], f32[2,4]) parameter(0)
  %n = s32[] constant(3)
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%turn (t: (s32[], f32[2,4])) -> (s32[], f32[2,4]) {
  %t = (s32[], f32[2,4]) parameter(0)
  %x = f32[2,4] get-tuple-element(%t), index=1
  %y = f32[8] bitcast(%x)
  %begun = (f32[2,4], f32[16,4], MARK) fusion(%x), calls=%begin
  %space = f32[16,4] get-tuple-element(%begun), index=1
  %mark = MARK get-tuple-element(%begun), index=2
  %work = (f32[8], f32[2,4], f32[16,4], f32[16,4], MARK) fusion(%x, %space, %mark, %y), calls=%amid
  %ended = f32[16,4] fusion(%x, %space), calls=%finish
  %more = f32[16,4] fusion(%x), calls=%other
  ROOT %next = (s32[], f32[2,4]) tuple(%t, %x)
}

ENTRY %main (a: f32[2,4]) -> (s32[], f32[2,4]) {
  %a = f32[2,4] parameter(0)
  ROOT %loop = (s32[], f32[2,4]) while(%a), condition=%bound, body=%turn
}
""".replace("MARK", "u32[]{:S(2)}").replace("GROUPS", "replica_groups=[2,8]<=[16]")
    shard, whole, work = 32, 256, 32
    found = traffic(program)
    assert found.interconnect == 3 * 2 * 7 / 8 * whole  # channels 5 and 6, in each of 3 turns
    assert found.memory == 3 * ((shard + whole) + 2 * work + (shard + whole))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 3])
def test_a_convolution_and_both_of_its_gradients_have_equal_operations(stride, groups):
    size, kernel = (9 - 3) // stride + 1, (3, 3, 6 // groups, 12)

    def convolved(x, w):
        return jax.lax.conv_general_dilated(
            x,
            w,
            (stride, stride),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    x, w = jnp.ones((2, 9, 9, 6)), jnp.ones(kernel)
    once = 2 * (2 * size * size * 12) * (3 * 3 * 6 // groups)
    assert matrix_flops(jax.make_jaxpr(convolved)(x, w)) == once
    for argument in (0, 1):
        gradient = jax.grad(lambda x, w: convolved(x, w).sum(), argnums=argument)
        counted = matrix_flops(jax.make_jaxpr(gradient)(x, w))
        assert counted == 2 * once, argument


def test_only_the_costlier_branch_of_a_conditional_counts():
    program = """
HloModule step

%small (p: f32[4]) -> f32[4] {
  %p = f32[4] parameter(0)
  ROOT %s = f32[4] sine(%p)
}

%large (p.1: f32[4]) -> f32[4] {
  %p.1 = f32[4] parameter(0)
  %turn = f32[4] collective-permute(%p.1)
  ROOT %c = f32[4] cosine(%turn)
}

ENTRY %main (i: s32[], a: f32[4]) -> f32[4] {
  %i = s32[] parameter(0)
  %a = f32[4] parameter(1)
  ROOT %one = f32[4] conditional(%i, %a, %a), branch_computations={%small, %large}
}
"""
    assert traffic(program) == (2 * 32, 16)


def test_a_tpu_reduces_and_scatters_slices_and_allocates():
    program = """
HloModule step

%all-reduce-scatter.1 (p: f32[64]) -> f32[8] {
  %p = f32[64] parameter(0)
  %r = f32[64] all-reduce(%p), channel_id=1, replica_groups=[2,8]<=[16], to_apply=%add
  ROOT %part = f32[8] dynamic-slice(%r), dynamic_slice_sizes={8}
}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %z = f32[] add(%x, %y)
}

ENTRY %main (a: f32[64]) -> f32[8] {
  %a = f32[64] parameter(0)
  %room = f32[1000] custom-call(), custom_call_target="AllocateBuffer"
  %go = ((f32[64]), f32[8]{0:S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:8]}
  %gone = f32[8]{0:S(1)} slice-done(%go)
  %sum = f32[4] all-reduce(%a), channel_id=1, replica_groups=mesh['x'=2,'y'=8] {'y'}, to_apply=%add
  ROOT %own = f32[8] fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    found = traffic(program)
    assert found.interconnect == 7 / 8 * 256 + 2 * 7 / 8 * 16
    assert found.memory == 32 + (256 + 16) + (256 + 32)
