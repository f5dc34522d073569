"""Mutation testing of the kernels: breaks one line at a time, in a copy of the project, and runs the nearest tests.

    python tools/mutate.py [name ...] [--list]

For each mutation, the program prints the test that went red. The program fails in three cases: no test notices a
mutation, the tests are red without a mutation, or the line to break is no longer in the file. To add a mutation, append
to MUTATIONS.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("reval_kernels", "tests/reval_kernels", "pyproject.toml", "setup.py", "README.md")
CONFTEST = """
from hypothesis import Phase, settings
# One red test is enough, so hypothesis does not search for the smallest failing example.
settings.register_profile("mutate", deadline=None, phases=[Phase.explicit, Phase.generate])
settings.load_profile("mutate")
"""
TESTS = "tests/reval_kernels/"
TRITON = TESTS + "gpu/test_triton_"


@dataclass(frozen=True)
class Mutation:
    """One deliberate error in one source file."""

    name: str
    file: str
    """Path below reval_kernels/backends/."""
    old: str
    """Source text to replace. The text occurs exactly once in the file."""
    new: str
    tests: str
    """The tests to run: files, then optionally -k and an expression, as pytest takes them."""


MUTATIONS = [
    # --- triton: rows -----------------------------------------------------------------------------------------------
    Mutation(
        "rows: padding is filled before softcap", "gpu/rows.py",
        '            x = tl.where(inside, x, float("-inf"))  # only now', "            x = x  # only now",
        TRITON + "rows.py -k softcap_comes_before",
    ),
    Mutation(
        "rows: the sum is not rescaled when the maximum rises", "gpu/rows.py",
        "(1 + s) * fall + (tops - 1))", "1 + s + (tops - 1))",
        TRITON + "rows.py -k shared_by_programs",
    ),
    Mutation(
        "rows: 32-bit offsets", "gpu/rows.py",
        '    """Program (n, k) reads `blocks` blocks of row n, the k-th such run. Row n = (n // inner, n % inner)."""\n'
        "    token, split = tl.program_id(0).to(tl.int64), tl.program_id(1)",
        "    token, split = tl.program_id(0), tl.program_id(1)",
        TRITON + "rows.py -k two_to_the_31",
    ),
    Mutation(
        "rows: a program reads one column of the next one's", "gpu/rows.py",
        "        inside = column < last\n"
        "        x = tl.load(row + offset_of(column, stride_v, CONTIGUOUS), mask=inside, other=f",
        "        inside = column <= last\n"
        "        x = tl.load(row + offset_of(column, stride_v, CONTIGUOUS), mask=inside, other=f",
        TRITON + "rows.py -k shared_by_programs",
    ),
    Mutation(
        "rows: 1 - p of a confident action by subtraction", "gpu/common.py",
        "- d_log * expm1(log_pi)", "- d_log * (tl.exp2(log_pi * LOG2E) - 1)",
        TESTS + "test_values.py -k confident_action",
    ),
    Mutation(
        "rows: the gradient forgets the slope of the softcap", "gpu/rows.py",
        "            g = g * slope", "            g = g",
        TRITON + "rows.py -k shared_by_programs",
    ),
    Mutation(
        "rows: the gradient forgets the temperature", "gpu/rows.py",
        "    d_all, at_action = d_all * scale, at_action * scale", "    d_all = d_all * scale",
        TRITON + "rows.py -k shared_by_programs",
    ),
    Mutation(
        "rows: ties among neighbours count once", "gpu/rows.py",
        "        tops = tl.sum(at_top.to(tl.float32), 1)", "        tops = tl.max(at_top.to(tl.float32), 1)",
        TRITON + "rows.py -k every_place_of_a_group",
    ),
    Mutation(
        "rows: masked rows keep what lay in memory", "gpu/rows.py",
        "        if tl.load(mask + token) == 0:\n            for start",
        "        if tl.load(mask + token) == 2:\n            for start",
        TRITON + "rows.py -k shared_by_programs",
    ),
    # --- triton: parts and their merge ------------------------------------------------------------------------------
    Mutation(
        "merge: all parts at the top stay out of the sum", "gpu/common.py",
        "(tl.sum(top.to(tl.float32), ROWS) - 1)", "0",
        TRITON + "rows.py -k tie_for_the_top",
    ),
    Mutation(
        "merge: a part that holds nothing has weight at high temperatures", "gpu/common.py",
        "m = tl.load(at, mask=there, other=LOWEST)  # past the last part: empty parts\n"
        "    s = tl.load(at + plane, mask=there, other=-1.0)",
        "m = tl.load(at, mask=there, other=LOWEST)\n    s = tl.load(at + plane, mask=there, other=0.0)",
        TESTS + "test_linear_values.py -k uniform_limit",
    ),
    Mutation(
        "rows: a lane that holds nothing has weight at high temperatures", "gpu/rows.py",
        "    s = tl.full([GROUPS], -1.0, tl.float32)", "    s = tl.zeros([GROUPS], tl.float32)",
        TESTS + "test_values.py -k large_temperature",
    ),
    Mutation(
        "common: 1 / T is 0 at T = inf", "gpu/common.py",
        "    return tl.maximum(1 / temperature, tl.full([], LEAST, tl.float32))", "    return 1 / temperature",
        TESTS + "test_values.py -k uniform_limit",
    ),
    Mutation(
        "merge: row_max by division, the backward by multiplication", "gpu/common.py",
        "row_max * inverse_of(temperature), log_sum", "v - log_sum, log_sum",
        TESTS + "test_values.py -k confident or common_offset or softcap_and",
    ),
    # --- triton: linear ---------------------------------------------------------------------------------------------
    Mutation(
        "linear: padding is not removed", "gpu/linear_kernels.py",
        '        x = tl.where(real[None, :], x, float("-inf"))', "        x = x",
        TRITON + "linear.py -k test_shapes",
    ),
    Mutation(
        "linear: the last group is as large as the others", "gpu/linear_kernels.py",
        "    size = tl.minimum(GROUP, tl.cdiv(rows, ROWS) - group * GROUP)", "    size = GROUP",
        TRITON + "linear.py -k company",
    ),
    Mutation(
        "linear: the width's last step is not masked", "gpu/linear_kernels.py",
        "mask=(d + depth < width)[:, None]", "mask=(d + depth < width + 1)[:, None]",
        TRITON + "linear.py -k test_strides",
    ),
    Mutation(
        "linear: a chunk's weights forget the slope of the softcap", "gpu/linear_kernels.py",
        "            g = g * slope", "            g = g",
        TRITON + "linear.py -k loss_in_both_forms",
    ),
    Mutation(
        "linear: the action's gradient comes from its weight", "gpu/linear_kernels.py",
        "        g = tl.where(word == action, at_action, g)", "        g = g",
        TRITON + "linear.py -k loss_in_both_forms",
    ),
    Mutation(
        "linear: a tile's weights are taken for the row's", "gpu/linear_kernels.py",
        "        factor = tl.exp2((m * scale - top) * LOG2E) * d_all", "        factor = d_all + m * 0",
        TRITON + "linear.py -k loss_in_both_forms",
    ),
    Mutation(
        "linear: logits computed again by another matmul", "gpu/chunked_head.py",
        "            compute_gradient(head, actions, transform, statistics, cotangents, dlogits)",
        "            logits = head.hidden.float() @ head.weight.float().T + (0 if head.bias is None else head.bias)\n"
        "            from ..rows import row_gradient_\n"
        "            dlogits.copy_(row_gradient_(logits, actions, transform, statistics, cotangents))",
        TRITON + "linear.py -k confident_state or test_shapes",
    ),
    Mutation(
        "linear: the first of several chunks rounds the weight's gradient", "gpu/chunked_head.py",
        "torch.float32 if self.wide or not self.single else", "torch.float32 if self.wide else",
        TRITON + "linear.py -k several_chunks",
    ),
    # --- triton: bellman --------------------------------------------------------------------------------------------
    Mutation(
        "bellman: a segment takes the next one's first token", "gpu/bellman.py",
        "tl.minimum(end, tokens)", "tl.minimum(end + 1, tokens)",
        TRITON + "bellman.py",
    ),
    Mutation(
        "bellman: masked tokens keep what lay in memory", "gpu/bellman.py",
        "            tl.store(out_c + token, tl.zeros([BLOCK], tl.float32), mask=other)\n", "",
        TRITON + "bellman.py",
    ),
    Mutation(
        "bellman: no kernel checks cu_seqlens", "gpu/common.py",
        'ASSERTS = {"debug": True,', 'ASSERTS = {"debug": False,',
        TRITON + "bellman.py -k cu_seqlens",
    ),
    Mutation(
        "bellman: cu_seqlens may fall", "gpu/bellman.py",
        "whole & (start <= end)", "whole",
        TRITON + "bellman.py -k cu_seqlens",
    ),
    Mutation(
        "bellman: sums to go run forwards", "gpu/bellman.py",
        "tl.cumsum(dlog, 0, reverse=True)", "tl.cumsum(dlog, 0)",
        TRITON + "bellman.py",
    ),
    Mutation(
        "bellman: what later blocks hold is forgotten", "gpu/bellman.py",
        "            to_go += tl.sum(dlog, 0)", "            to_go += 0",
        TRITON + "bellman.py",
    ),
    Mutation(
        "bellman: environment tokens get a place", "gpu/bellman.py",
        "    if MASKED:\n", "    if MASKED and False:\n",
        TRITON + "bellman.py",
    ),
    Mutation(
        "bellman: the residual's gradient reaches every state's value", "gpu/bellman.py",
        "        first = tl.where(step == 0, of_residual, 0.0)",
        "        first = tl.where(step >= 0, of_residual, 0.0)",
        TRITON + "bellman.py",
    ),
    # --- portable ---------------------------------------------------------------------------------------------------
    Mutation(
        "portable: the top's weight joins the sum", "rows.py",
        "    log_sum = torch.where(top.isinf(), top, others.log1p())",
        "    log_sum = torch.where(top.isinf(), top, (others + 1).log())",
        TESTS + "test_values.py -k confident_action",
    ),
    Mutation(
        "portable: the gradient forgets tanh", "rows.py",
        "        gradient.mul_(tanh.square_().neg_().add_(1))", "        pass",
        TESTS + "test_values.py -k softcap_and",
    ),
    Mutation(
        "portable: 1 / T is 0 at T = inf", "rows.py",
        "reciprocal().clamp_(min=least)", "reciprocal()",
        TESTS + "test_values.py -k uniform_limit",
    ),
    Mutation(
        "portable: the reward comes one step late", "trajectories.py",
        "        self.last = step == self.counts[:, None] - 1", "        self.last = step == self.counts[:, None]",
        TESTS + "test_bellman.py -k targets",
    ),
    Mutation(
        "portable: the next state is the one before", "trajectories.py",
        "    out[:, :-1] = v[:, 1:]", "    out[:, 1:] = v[:, :-1]",
        TESTS + "test_bellman.py -k targets",
    ),
    Mutation(
        "portable: the first state's value gets no gradient from the residual", "bellman.py",
        "        dv[:, :1] += d_residual[:, None]\n", "",
        TESTS + "test_bellman.py",
    ),
    Mutation(
        "portable: chunks of the weight's gradient replace each other", "chunks.py",
        "dlogits.T @ hidden if self.d_weight is None else self.d_weight.addmm_(dlogits.T, hidden)",
        "dlogits.T @ hidden",
        TESTS + "test_portable.py -k not the_logits_never",
    ),
    Mutation(
        "portable: a frozen head's sum takes the action in", "frozen_head.py",
        "    return Cotangents(-values.log_prob.expm1(), zero, -one, None)",
        "    return Cotangents(zero, zero, -one, None)",
        TESTS + "test_linear_values.py -k frozen_head_of",
    ),
    Mutation(
        "portable: softcap's slope is missing at a frozen head's action", "frozen_head.py",
        "            at_action = at_action * softcap_slope(", "            at_action = at_action + 0 * softcap_slope(",
        TESTS + "test_linear_values.py -k frozen_head_options",
    ),
    Mutation(
        "eager: a mode sees no op", "../torch_private.py",
        "if thread != _keys_of_a_plain_thread() or torch._C", "if torch._C",
        TESTS + "test_eager.py -k mode",
    ),
    Mutation(
        "eager: a lazy negation is lost", "../torch_private.py",
        "if keys != plain or type(x)", "if type(x)",
        TESTS + "test_eager.py -k negat",
    ),
    Mutation(
        "eager: autocast reaches the backends", "../grouped_op.py",
        "if not torch.is_autocast_enabled(device.type):", "if True:",
        TESTS + "test_library.py -k autocast",
    ),
    Mutation(
        "checks: an action one past the vocabulary passes", "../checks.py",
        "    elif not (int(low) >= 0 and int(high) < vocabulary):",
        "    elif not (int(low) >= 0 and int(high) <= vocabulary):",
        TESTS + "test_checks.py -k outside",
    ),
    Mutation(
        "checks: rows may overlap if they are not expanded", "../checks.py",
        "        if size > 1 and step <= reach:", "        if size > 1 and step == 0:",
        TESTS + "test_values.py -k shared_between",
    ),
    Mutation(
        "checks: a number that float32 cannot hold passes", "../checks.py",
        "    if not (smallest <= real <= largest or real == math.inf):", "    if not real > 0:",
        TESTS + "test_checks.py -k test_message",
    ),
    Mutation(
        "checks: a token's temperature may overflow in float32", "../checks.py",
        "        refused |= (each > largest) & (each < math.inf)", "        pass",
        TESTS + "test_checks.py -k temperature_of_a_token",
    ),
    Mutation(
        "checks: cu_seqlens may end early", "../checks.py",
        "int(cu_seqlens[-1]) == tokens and ", "",
        TESTS + "test_checks.py -k cu_seqlens",
    ),
    Mutation(
        "checks: differences of cu_seqlens may overflow", "../checks.py",
        "(cu_seqlens[1:] >= cu_seqlens[:-1]).all()", "(cu_seqlens.diff() >= 0).all()",
        TESTS + "test_checks.py -k cu_seqlens and portable",
    ),
    Mutation(
        "shards: the tops of all slices stay out of the sum", "../sharded.py",
        "        others = others + (top - 1)\n", "",
        TESTS + "test_sharded.py",
    ),
    Mutation(
        "shards: an action elsewhere gets the gradient of its own", "../sharded.py",
        "        dv = torch.where(owned, dv, dv - dlog_prob)\n", "",
        TESTS + "test_sharded.py",
    ),
    # --- C++ --------------------------------------------------------------------------------------------------------
    Mutation(
        "C++ lanes: the sum is not rescaled when the maximum rises", "cpu/lanes.h",
        "  s.others = factor * (s.others + joining);", "  s.others = s.others + joining;",
        TESTS + "test_values.py -k values_and_gradients",
    ),
    Mutation(
        "C++ lanes: nobody looks for a new maximum", "cpu/lanes.h",
        "__builtin_expect(all_negative(below), 1)", "true",
        TESTS + "test_values.py -k values_and_gradients",
    ),
    Mutation(
        "C++ lanes: the gradient of an infinite row", "cpu/lanes.h",
        "finite ? row_max : row_max + log_sum", "row_max",
        TESTS + "cpu/test_cpu.py -k not_finite",
    ),
    Mutation(
        "C++ rows: padding is filled before softcap", "cpu/rows.cpp",
        "  for (int i = n; i < W; ++i) z[i] = -kInfinity;\n", "",
        TESTS + "test_values.py -k values_and_gradients",
    ),
    Mutation(
        "C++ rows: a block is taken in with its new maximum", "cpu/rows.cpp",
        "if (block.reduce<type, false>(x, at, inv, s.shift)) {",
        "if (block.reduce<type, false>(x, at, inv, s.shift) || true) {",
        TESTS + "cpu/test_cpu.py -k every_instruction_set",
    ),
    Mutation(
        "C++ rows: a block's gradients are all those of its first vectors", "cpu/rows.cpp",
        "        block.expand(k, by.from_all, e);", "        block.expand(0, by.from_all, e);",
        TESTS + "cpu/test_cpu.py -k every_instruction_set",
    ),
    Mutation(
        "C++ lanes: the gradient forgets tanh", "cpu/lanes.h",
        "    g = g * fused(-tanh, tanh, splat(1.0f));", "    (void)tanh;",
        TESTS + "test_values.py -k softcap_and",
    ),
    Mutation(
        "C++ rows: masked rows keep what lay in memory", "cpu/rows_ops.cpp",
        "        std::memset(target, 0, length * size);\n", "",
        TESTS + "test_values.py -k masked_tokens",
    ),
    Mutation(
        "C++ columns: the sum of the tiles before is not rescaled", "cpu/columns.cpp",
        "    total = factor[i] * total + others[i];", "    total = total + others[i];",
        TESTS + "test_linear_values.py -k test_values_and_gradients",
    ),
    Mutation(
        "C++ tokens: 1 - p of a confident action by subtraction", "cpu/tokens.cpp",
        "- d.dlog_prob * std::expm1(log_p)", "- d.dlog_prob * (p - 1.0f)",
        TESTS + "test_values.py -k confident_action",
    ),
    Mutation(
        "C++ bellman: a segment takes the next one's first token", "cpu/bellman.cpp",
        "end = bounds_[b + 1];", "end = std::min(bounds_[b + 1] + 1, bounds_.back());",
        TESTS + "test_bellman.py",
    ),
    Mutation(
        "C++ bellman: masked tokens keep what lay in memory", "cpu/bellman.cpp",
        "        for (const Output<T>* out : outputs) out->clear(begin, end);\n", "",
        TESTS + "test_bellman.py",
    ),
    Mutation(
        "C++ bellman: the next state is this one", "cpu/bellman.cpp",
        "dv.set(at[h + 1], -scale * error);", "dv.set(at[h], -scale * error);",
        TESTS + "test_bellman.py",
    ),
    Mutation(
        "C++ bellman: the residual's gradient reaches every state's value", "cpu/bellman.cpp",
        "(h == 0 ? residual : 0.0)", "residual",
        TESTS + "test_bellman.py",
    ),
    Mutation(
        "C++ linear: blocks of the weight's gradient replace each other", "cpu/linear_backward.cpp",
        "b > 0 || t > 0, to + d,", "t > 0, to + d,",
        TESTS + "test_linear_values.py -k accumulates",
    ),
    Mutation(
        "C++ linear: strips of the weight's gradient replace each other", "cpu/linear_backward.cpp",
        "b > 0 || t > 0, to + d,", "b > 0, to + d,",
        TESTS + "cpu/test_kept.py -k gradients",
    ),
    Mutation(
        "C++ linear: the bias' gradient takes the first strip again and again", "cpu/linear_backward.cpp",
        "rows[t / kStrip * next_strip_ + w * ld_ + t % kStrip]", "rows[w * ld_ + t % kStrip]",
        TESTS + "test_linear_values.py " + TESTS + "cpu/test_kept.py -k bias",
    ),
    Mutation(
        "C++ linear: the bias' gradient is summed in fp32", "cpu/linear_backward.cpp",
        "sum += static_cast<float>(rows[", "sum = static_cast<float>(sum) + static_cast<float>(rows[",
        TESTS + "test_linear_values.py -k bias_gradient",
    ),
    Mutation(
        "C++ linear: what fills up a bf16 head's last strip is left as it was", "cpu/linear.h",
        "      std::fill(down + multiple(count, 2) * width, down + multiple(count, kColumns) * width, E(0.0f));\n", "",
        TESTS + "test_linear_values.py " + TESTS + "cpu",
    ),
    Mutation(
        "C++ linear: a frozen head's first words may be -inf apart from -inf", "cpu/linear_forward.cpp",
        "std::max(Sums::kLowest, of.maximum[r] * inv[r])", "of.maximum[r] * inv[r]",
        TESTS + "test_linear_values.py -k begins_with",
    ),
    Mutation(
        "C++ linear: the lowest number counts once more", "cpu/linear_forward.cpp",
        "of.others[r] - (of.maximum[r] == Sums::kLowest)", "of.others[r]",
        TESTS + "test_linear_values.py -k lowest_number",
    ),
    Mutation(
        "C++ tokens: 1 / T is 0 at T = inf", "cpu/tokens.cpp",
        "std::max(1.0f / each.const_data_ptr<float>()[i], least)", "1.0f / each.const_data_ptr<float>()[i]",
        TESTS + "test_values.py -k uniform_limit",
    ),
    Mutation(
        "C++ rows: the lowest number is nothing", "cpu/tokens.cpp",
        "(maximum == kLowest && others < -0.5)", "(maximum == kLowest && !std::isnan(others))",
        TESTS + "test_values.py -k lowest_numbers",
    ),
    Mutation(
        "C++ linear: 64 summands replace those before", "cpu/linear.h",
        "ldc, add || i > 0, a + i,", "ldc, add, a + i,",
        TESTS + "test_linear_values.py -k test_values_and_gradients",
    ),
    Mutation(
        "C++ linear: what is gathered starts with the first strip", "cpu/linear.h",
        "offsets_[strip * kStrip + i]", "offsets_[i]",
        TESTS + "cpu/test_kept.py -k mask_bias",
    ),
    Mutation(
        "C++ linear: a state's entries are thought to be next to each other", "cpu/linear.h",
        "hidden_(hidden.stride(-1) == 1 ? hidden : hidden.contiguous())", "hidden_(hidden)",
        TESTS + "test_linear_values.py -k test_any_strides",
    ),
    Mutation(
        "C++ linear: the head's gradient runs over logits still kept", "cpu/linear_backward.cpp",
        " && kept_.count() <= cut_.block)", ")",
        TESTS + "cpu/test_kept.py -k gradients",
    ),
    Mutation(
        "C++ linear: a kept action has about its logit", "cpu/linear_backward.cpp",
        "kept_.has(s) ? action_logits_[at + r] : x[own * kStrip + r]", "x[own * kStrip + r]",
        TESTS + "cpu/test_kept.py -k confident",
    ),
    Mutation(
        "C++ kept: a softcap brings back what counts as impossible", "cpu/columns.cpp",
        " && !(all_of_them && low);", " && (all_of_them || true);",
        TESTS + "cpu/test_kept.py -k softcap_brings",
    ),
    Mutation(
        "C++ kept: what does not fit into 16 bits is kept", "cpu/columns.cpp",
        "return all_negative((I)(most - kMostKept))", "return true",
        TESTS + "cpu/test_kept.py -k far_above",
    ),
    Mutation(
        "C++ linear: a frozen head's sum takes the action in", "cpu/linear_forward.cpp",
        "{ x[own * kStrip + r] = 0; }", "{ (void)r, (void)own; }",
        TESTS + "test_linear_values.py -k frozen_head_of",
    ),
    Mutation(
        "C++ linear: the action's gradient is that of any word", "cpu/linear_backward.cpp",
        "{ out[own * kStrip + r] = own_gradients[r]; }", "{ (void)r, (void)own; }",
        TESTS + "test_linear_values.py -k softcap_temperature",
    ),
]  # fmt: skip


def backend_of(mutation: Mutation) -> str:
    folder = mutation.file.split("/")[0]
    return {"gpu": "triton", "cpu": "cpu"}.get(folder, "portable")


def build(copy: Path) -> None:
    """Compile the C++ kernels of the copy. CMake compiles only files that changed since the last build."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    torch = importlib.util.find_spec("torch")
    assert torch and torch.origin, "torch is not installed"
    configure = ["cmake", "-S", ".", "-B", "build", f"-DTORCH_DIR={Path(torch.origin).parent}"]
    for command in (configure, ["cmake", "--build", "build"]):
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")


def run(copy: Path, mutation: Mutation) -> tuple[int, str]:
    """Run the mutation's tests. Returns pytest's exit status and output."""
    if backend_of(mutation) == "cpu":
        build(copy)
    files, _, expression = mutation.tests.partition(" -k ")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files.split()]
    environment = os.environ | {"PYTHONPATH": str(copy), "REVAL_TEST_BACKENDS": backend_of(mutation)}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1"}
    command += ["-k", expression] if expression else []
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def red_test(output: str) -> str:
    found = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
    return found[1] if found else output.strip().split("\n")[-1]


def check(mutation: Mutation, copy: Path) -> str | None:
    """Break the file, run the tests, restore the file. Returns the problem, or None if a test went red."""
    path = copy / "reval_kernels" / "backends" / mutation.file
    whole = path.read_text()
    if whole.count(mutation.old) != 1:
        return f"the line to break occurs {whole.count(mutation.old)} times in {mutation.file}"
    path.write_text(whole.replace(mutation.old, mutation.new))
    try:
        status, output = run(copy, mutation)
    finally:
        path.write_text(whole)
    if status == 0:
        return "SURVIVED: no test went red"
    if status != 1:  # 1: tests ran and failed; any other status: the tests did not run
        return f"pytest ended with {status}: {output[-500:]}"
    print(f"red    {mutation.name}\n         {red_test(output)}", flush=True)
    return None


class Progress:
    """Prints the number of finished steps, the seconds for each step, and the time left."""

    def __init__(self, total: int):
        self.total, self.done, self.start = total, 0, time.monotonic()

    def step(self, what: str = "") -> None:
        self.done += 1
        each = (time.monotonic() - self.start) / self.done
        left = each * (self.total - self.done) / 60
        what = what and what + "\n"
        print(f"{what}         [{self.done} of {self.total}, {each:.1f} s each, {left:.0f} min left]", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", nargs="*", help="only mutations whose name or file contains one of these")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    options = parser.parse_args()
    chosen = [m for m in MUTATIONS if not options.name or any(part in m.name + m.file for part in options.name)]
    if options.list:
        print("\n".join(m.name for m in chosen))
        return
    wrong = {}
    baselines = {(m.tests, backend_of(m)): m for m in chosen}
    progress = Progress(len(baselines) + len(chosen))
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
            elif (ROOT / name).exists():
                shutil.copy(ROOT / name, copy / name)
        (copy / "tests" / "conftest.py").write_text(CONFTEST)
        for mutation in baselines.values():
            status, output = run(copy, mutation)
            if status != 0:
                wrong[mutation.tests] = f"red (or nothing to run) before anything was broken: {output[-1500:]}"
            progress.step(f"{'green' if status == 0 else 'WRONG'}  unbroken: {mutation.tests}")
        for mutation in chosen:
            if problem := check(mutation, copy):
                wrong[mutation.name] = problem
                print(f"WRONG  {mutation.name}\n         {problem}", flush=True)
            progress.step()
    for name, problem in wrong.items():
        print(f"{name}: {problem}")
    print(f"{len(chosen) - len(wrong)} of {len(chosen)} breakages noticed")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
