"""What is read off the text of compiled programs."""

import pytest

from pallas_kernels.aot import hlo

PROGRAM = """
%piece.1 (p: bf16[1,64]) -> bf16[4,64] {
  %all-gather.1 = bf16[4,64]{1,0} all-gather(%p), channel_id=7, replica_groups=GROUPS
}

%piece.2 (p: bf16[1,64]) -> bf16[4,64] {
  %all-gather.2 = bf16[4,64]{1,0} all-gather(%p), channel_id=7, replica_groups=GROUPS
}

%all-reduce-scatter.1 (p: bf16[4,64]) -> bf16[1,64] {
  %all-reduce.1 = bf16[4,64]{1,0} all-reduce(%p), channel_id=11, replica_groups=GROUPS
  ROOT %kept = bf16[1,64]{1,0} dynamic-slice(%all-reduce.1, %i)
}

%condition (c: (s32[])) -> pred[] {
  %bound = s32[] constant(10)
}

%body (c: (s32[])) -> (s32[]) {
  %fusion.1 = bf16[4,64]{1,0} fusion(%a), kind=kLoop, calls=%piece.1
  %fusion.2 = bf16[4,64]{1,0} fusion(%a), kind=kLoop, calls=%piece.2
  %start = (bf16[8], bf16[8], u32[], u32[]) collective-permute-start(%b), channel_id=8
  %done = bf16[8]{0} collective-permute-done(%start)
}

ENTRY %main (p: f32[]) -> f32[] {
  %loop = (s32[]) while(%t), condition=%condition, body=%body
  %sum = (f32[100]{0}, f32[]) all-reduce(%x, %y), channel_id=9, replica_groups=GROUPS
  %kept = bf16[1,64]{1,0} fusion(%d), kind=kCustom, calls=%all-reduce-scatter.1
  %part = f32[25]{0} reduce-scatter(%x), channel_id=10, replica_groups=GROUPS
}
"""


def test_a_loop_of_no_fixed_length_counts_once():
    text = PROGRAM.replace("constant(10)", "parameter(0)").replace("GROUPS", "[2,4]")
    assert hlo.sent(text)["collective-permute"] == 16


@pytest.mark.parametrize(
    "groups",
    ["{{0,1,2,3},{4,5,6,7}}", "[2,4]<=[8]", "mesh['x'=2,'y'=2,'z'=2] {'x','z'}"],
)
def test_bytes_of_collectives(groups):
    """Of four devices, in a loop of ten rounds; what is in pieces counts once."""
    assert hlo.sent(PROGRAM.replace("GROUPS", groups)) == {
        "all-gather": 10 * 512 * 3 // 4,
        "collective-permute": 10 * 16,
        "all-reduce": 2 * 404 * 3 // 4,
        "reduce-scatter": 100 * 3 + 512 * 3 // 4,
    }


def test_loops_that_count_in_unsigned_numbers():
    text = PROGRAM.replace("%bound = s32[]", "%bound = u32[]")
    assert hlo.sent(text) == hlo.sent(PROGRAM)
