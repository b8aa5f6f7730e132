"""Summaries of traces: made by hand with known answers, drawn at random and counted moment by moment, and real ones."""

from __future__ import annotations

import gzip
import json
import random
from itertools import pairwise
from pathlib import Path

import pytest
from support import run_python

from launch.cli import main
from train.trace_events import Event, TraceError, clip, nest, read_trace, subtract, total, union
from train.trace_names import kernel_group, operator_group, short_name
from train.trace_summary import Summary, summarize
from train.trace_text import comparison_text, trace_text

HOST, BACKWARD = 100, 200
COMPUTE_STREAM, NCCL_STREAM = 7, 20
GEMM = "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel__5x_cublas"
GATHER = "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
SCATTER = "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
ADD = (
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>, "
    "std::array<char*, 3ul> >(int, at::native::CUDAFunctor_add<c10::BFloat16>, std::array<char*, 3ul>)"
)
FLASH = "void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4, false, false, cutlass::bfloat16_t> >(x::Params)"
ADAM = (
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous namespace)::"
    "FusedOptimizerTensorListMetadata<4>, at::native::FusedAdamMathFunctor<float, 4> >(int)"
)
PAGED = "Memcpy HtoD (Pageable -> Device)"


def entry(name: str, category: str, start: float, end: float, tid: object = HOST, pid: object = 1, **args) -> dict:
    args = {key.replace("_", " ") if key == "External_id" else key: value for key, value in args.items()}
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "pid": pid,
        "tid": tid,
        "ts": start,
        "dur": end - start,
        "args": args,
    }


def kernel(name: str, start: float, end: float, stream: int, correlation: int = 0, category: str = "kernel", **args):
    where = {"device": 0, "stream": stream, "correlation": correlation}
    return entry(name, category, start, end, tid=stream, pid=0, **where, **args)


def launch(start: float, correlation: int, tid: int = HOST, name: str = "cudaLaunchKernel", end: float | None = None):
    return entry(name, "cuda_runtime", start, start + 1 if end is None else end, tid, correlation=correlation)


def write_trace(path: Path, events: list, **head) -> Path:
    data = json.dumps({"schemaVersion": 1, "traceEvents": events, **head}).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def gpu_events() -> list[dict]:
    """Two steps on one GPU, drawn on paper; see the test below for the picture."""
    return [
        {"ph": "M", "name": "process_name", "pid": 1, "tid": 0, "args": {"name": "python"}},
        entry("ProfilerStep#10", "user_annotation", 0, 100),
        entry("ProfilerStep#11", "user_annotation", 100, 200),
        entry("ProfilerStep#10", "gpu_user_annotation", 10, 65, tid=COMPUTE_STREAM, pid=0),
        launch(1, 1),
        launch(3, 2),
        launch(5, 3),
        entry("aten::copy_", "cpu_op", 47, 62),
        launch(48, 4, name="cudaMemcpyAsync", end=61),
        entry("reading", "user_annotation", 60, 99, BACKWARD),
        entry("aten::item", "cpu_op", 62, 98, BACKWARD),
        launch(64, 90, BACKWARD, "cudaStreamSynchronize", end=97),
        launch(98.5, 5, BACKWARD),
        launch(101, 6),
        launch(103, 7),
        entry("Optimizer.step#AdamW.step", "user_annotation", 120, 160),
        launch(149, 8),
        kernel(GEMM, 10, 30, COMPUTE_STREAM, 1),
        kernel(GATHER, 20, 50, NCCL_STREAM, 2),
        kernel(ADD, 40, 45, COMPUTE_STREAM, 3),
        kernel(PAGED, 60, 65, COMPUTE_STREAM, 4, "gpu_memcpy", bytes=4000),
        kernel(SCATTER, 100, 130, NCCL_STREAM, 5),
        kernel(GEMM, 110, 120, COMPUTE_STREAM, 6),
        kernel(FLASH, 120, 125, COMPUTE_STREAM, 7),
        kernel(ADAM, 150, 160, COMPUTE_STREAM, 8),
    ]


@pytest.fixture
def gpu_trace(tmp_path) -> Path:
    about = {"backend": "nccl", "rank": 3, "world_size": 8}
    return write_trace(tmp_path / "gpu.json.gz", gpu_events(), distributedInfo=about)


def microseconds(value: float) -> float:
    return round(value * 1e3, 6)


# A GPU


def test_computing_exposed_communication_and_idle_time_of_a_trace_drawn_on_paper(gpu_trace):
    # stream 7   GGGG....A...C.......GGF....O        each moment counts once; C is the copy
    # stream 20  ..NNNNNN........NNNNNN
    #            10  30 40   60     100   130 150-160
    found = summarize(gpu_trace)
    assert (found.device, found.rank, found.world_size, found.steps) == ("gpu", 3, 8, [10, 11])
    assert microseconds(found.ms) == 150
    assert microseconds(found.computing_ms) == (30 - 10) + (45 - 40) + (125 - 110) + (160 - 150)
    assert microseconds(found.communication_ms) == (50 - 20) + (130 - 100)
    assert microseconds(found.exposed_communication_ms) == (40 - 30) + (50 - 45) + (110 - 100) + (130 - 125)
    assert microseconds(found.idle_ms) == (60 - 50) + (100 - 65) + (150 - 130)
    assert found.host_step_ms == [0.1, 0.1]


def test_kernels_are_counted_by_name_and_by_kind(gpu_trace):
    found = summarize(gpu_trace)
    groups = {row.name: (row.count, microseconds(row.ms)) for row in found.groups}
    assert groups == {
        "communication": (2, 60),
        "matmul": (2, 30),
        "optimizer and clipping": (1, 10),
        "attention": (1, 5),
        "elementwise": (1, 5),
        "copy": (1, 5),
    }
    assert found.top[0].name == "ncclDevKernel_AllGather_RING_LL"
    gemm = next(row for row in found.top if row.group == "matmul")
    assert (gemm.count, microseconds(gemm.ms)) == (2, 30)
    assert [row.ms for row in found.top] == sorted((row.ms for row in found.top), reverse=True)
    assert {row.name for row in found.communication} == {
        "ncclDevKernel_AllGather_RING_LL",
        "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL",
    }


def test_gaps_say_what_the_thread_did_that_the_device_waited_for(gpu_trace):
    gaps = [(microseconds(gap.at_ms), microseconds(gap.ms), gap.host) for gap in summarize(gpu_trace).gaps]
    assert gaps == [
        (55, 35, "cudaStreamSynchronize in aten::item in reading"),
        (120, 20, "no operator (Python, or waiting) in Optimizer.step#AdamW.step"),
        (40, 10, "cudaMemcpyAsync in aten::copy_"),
    ]


def test_synchronizations_and_copies_are_counted(gpu_trace):
    found = summarize(gpu_trace)
    assert [(row.name, row.count, microseconds(row.ms)) for row in found.synchronizations] == [
        ("cudaStreamSynchronize", 1, 33)
    ]
    assert [(row.name, row.count, row.bytes) for row in found.copies] == [(PAGED, 1, 4000)]


def test_only_calls_that_wait_count_as_synchronizations(tmp_path):
    names = ["cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "hipStreamSynchronize", "cuCtxSynchronize"]
    others = ["cudaMemcpyAsync", "cudaLaunchKernel", "cudaStreamWaitEvent", "cudaEventQuery", "cudaMemsetAsync"]
    calls = [launch(i * 10, i, name=name) for i, name in enumerate([*names, *others])]
    found = summarize(write_trace(tmp_path / "t.json", [*calls, kernel(GEMM, 0, 5, 7)]))
    assert {row.name for row in found.synchronizations} == set(names)


def test_the_device_with_the_most_work_is_summed_up_where_there_are_two(tmp_path):
    second = kernel(GEMM, 0, 1000, 7)
    second["args"]["device"] = 1
    found = summarize(write_trace(tmp_path / "t.json", [kernel(GEMM, 0, 10, 7), second]))
    assert microseconds(found.ms) == 1000
    assert "2 devices" in found.notes[0]


def test_random_traces_agree_with_counting_every_microsecond(tmp_path):
    draw = random.Random(5)
    names = [GEMM, ADD, GATHER, SCATTER, PAGED]
    for trial in range(30):
        events = []
        for i in range(draw.randrange(1, 25)):
            start, name = draw.randrange(0, 200), draw.choice(names)
            category = "gpu_memcpy" if name == PAGED else "kernel"
            events.append(kernel(name, start, start + draw.randrange(1, 30), draw.randrange(4), i, category))
        draw.shuffle(events)
        found = summarize(write_trace(tmp_path / f"{trial}.json", events))
        first = min(e["ts"] for e in events)
        last = max(e["ts"] + e["dur"] for e in events)
        counts = dict.fromkeys(("computing", "communication", "exposed", "idle"), 0)
        for moment in range(first, last):
            running = {e["name"] for e in events if e["ts"] <= moment < e["ts"] + e["dur"]}
            computes, communicates = bool(running & {GEMM, ADD}), bool(running & {GATHER, SCATTER})
            counts["computing"] += computes
            counts["communication"] += communicates
            counts["exposed"] += communicates and not computes
            counts["idle"] += not running
        assert [microseconds(found.ms), *counts.values()] == [
            last - first,
            microseconds(found.computing_ms),
            microseconds(found.communication_ms),
            microseconds(found.exposed_communication_ms),
            microseconds(found.idle_ms),
        ]


# A CPU


def cpu_events() -> list[dict]:
    """One step: the main thread computes, calls for an all-reduce, computes beside it and waits; gloo has its own thread."""
    return [
        entry("ProfilerStep#4", "user_annotation", 0, 100),
        entry("aten::randn", "cpu_op", -20, -10),
        entry("aten::linear", "cpu_op", 10, 30),
        entry("aten::addmm", "cpu_op", 12, 28),
        entry("FSDP::post_backward", "user_annotation", 35, 80),
        entry("c10d::allreduce_", "cpu_op", 36, 40),
        entry("aten::mul", "cpu_op", 44, 50),
        entry("aten::mul", "cpu_op", 85, 95),
        entry("gloo:all_reduce", "user_annotation", 38, 70, tid=300),
        entry("aten::add_", "cpu_op", 60, 65, tid=300),
    ]


def test_a_cpu_trace_drawn_on_paper(tmp_path):
    found = summarize(write_trace(tmp_path / "cpu.json", cpu_events()))
    assert (found.device, found.steps, microseconds(found.ms)) == ("cpu", [4], 100)
    assert microseconds(found.computing_ms) == (30 - 10) + (50 - 44) + (95 - 85)
    assert microseconds(found.communication_ms) == 70 - 36, "the call and what gloo's thread does, once"
    assert microseconds(found.exposed_communication_ms) == (44 - 36) + (70 - 50)
    assert microseconds(found.idle_ms) == 10 + (36 - 30) + (85 - 70) + (100 - 95)
    own = {row.name: (row.count, microseconds(row.ms)) for row in found.top}
    assert own == {
        "aten::addmm": (1, 16),
        "aten::linear": (1, 4),
        "aten::mul": (2, 16),
        "c10d::allreduce_": (1, 4),
    }
    assert [(row.name, microseconds(row.ms)) for row in found.communication] == [("gloo:all_reduce", 32)]
    assert [(microseconds(gap.ms), gap.host) for gap in found.gaps[:2]] == [
        (15, "after aten::mul, before aten::mul, in FSDP::post_backward"),
        (10, "after aten::randn, before aten::linear"),
    ]


def test_waiting_under_an_annotation_inside_an_operator_is_no_computing(tmp_path):
    """Autograd's operators call the hooks of FSDP, which wait for gloo."""
    events = [
        entry("ProfilerStep#1", "user_annotation", 0, 100),
        entry("autograd::engine::evaluate_function: MmBackward0", "cpu_op", 0, 100),
        entry("FSDP::pre_backward (0)", "user_annotation", 10, 90),
        entry("gloo:all_gather", "user_annotation", 20, 80, tid=300),
    ]
    found = summarize(write_trace(tmp_path / "cpu.json", events))
    assert microseconds(found.computing_ms) == 20
    assert microseconds(found.exposed_communication_ms) == 60
    assert microseconds(found.idle_ms) == 20


def test_python_functions_are_part_of_the_operator_that_calls_them(tmp_path):
    events = [
        entry("MyFunctionBackward", "cpu_op", 0, 50),
        entry("file.py(3): backward", "python_function", 5, 45),
        entry("aten::mm", "cpu_op", 10, 20),
        entry("file.py(9): loop", "python_function", 50, 80),
        entry("aten::mm", "cpu_op", 80, 90),
    ]
    found = summarize(write_trace(tmp_path / "cpu.json", events))
    assert {row.name: microseconds(row.ms) for row in found.top} == {"MyFunctionBackward": 40, "aten::mm": 20}
    assert microseconds(found.idle_ms) == 30
    assert found.gaps[0].host == "after MyFunctionBackward, before aten::mm, in file.py(9): loop"


def test_calls_to_a_gpu_without_kernels_are_noted(tmp_path):
    found = summarize(write_trace(tmp_path / "t.json", [*cpu_events(), launch(20, 1)]))
    assert "CUPTI" in found.notes[0]


def test_own_times_agree_with_those_of_torch(tmp_path):
    import torch
    from torch.profiler import ProfilerActivity, profile

    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(3):
            model(torch.randn(16, 64)).square().mean().backward()
            optimizer.step()
    profiled.export_chrome_trace(str(tmp_path / "t.json.gz"))
    expected = {row.key: (row.count, row.self_cpu_time_total) for row in profiled.key_averages() if "::" in row.key}
    found = {row.name: (row.count, row.ms * 1e3) for row in summarize(tmp_path / "t.json.gz").top}
    assert len(expected) > 20
    for name, (count, own) in expected.items():
        assert found[name] == (count, pytest.approx(own, rel=0.01, abs=1)), name


# Intervals


def moments(intervals) -> set[int]:
    return {moment for start, end in intervals for moment in range(start, end)}


def test_arithmetic_of_intervals_agrees_with_sets_of_moments():
    draw = random.Random(1)

    def some() -> list[tuple[int, int]]:
        starts = [draw.randrange(60) for _ in range(draw.randrange(12))]
        return [(start, start + draw.randrange(10)) for start in starts]

    for _ in range(300):
        a, b = some(), some()
        whole, others = union(a), union(b)
        assert moments(whole) == moments(a)
        assert total(whole) == len(moments(a))
        assert all(left[1] < right[0] for left, right in pairwise(whole))
        assert moments(subtract(whole, others)) == moments(a) - moments(b)
        assert moments(clip(a, (20, 40))) == moments(a) & set(range(20, 40))


def test_segments_name_the_innermost_event_of_every_moment():
    draw = random.Random(2)

    def inside(start: int, end: int, depth: int) -> list[Event]:
        events = [Event(f"{start}-{end}-{depth}", "cpu_op", start, end, ("1", "1"))]
        at = start
        while depth < 4 and at < end - 1:
            child_start = draw.randrange(at, end)
            child_end = draw.randrange(child_start, end) + 1
            events += inside(child_start, child_end, depth + 1) if draw.random() < 0.7 else []
            at = child_end
        return events

    for _ in range(50):
        events = inside(0, 60, 0)
        order = sorted(range(len(events)), key=lambda i: (events[i].start, -events[i].end, i))
        segments = nest([events[i] for i in order])
        assert [s.start for s in segments] == sorted(s.start for s in segments)
        for moment in range(60):
            (segment,) = [s for s in segments if s.start <= moment < s.end]
            depths = [int(e.name.rsplit("-")[-1]) for e in events if e.start <= moment < e.end]
            assert int(segment.event.name.rsplit("-")[-1]) == max(depths)
        for event in events[1:]:
            assert event.parent is not None
            assert event.parent.start <= event.start <= event.end <= event.parent.end


def test_a_child_that_ends_after_its_parent_by_rounding_ends_with_it():
    events = [
        Event("parent", "cpu_op", 0, 10, ("1", "1")),
        Event("child", "cpu_op", 5, 10.001, ("1", "1")),
        Event("next", "cpu_op", 10, 12, ("1", "1")),
    ]
    found = [(s.start, s.end, s.event.name) for s in nest(events)]
    assert found == [(0, 5, "parent"), (5, 10, "child"), (10, 12, "next")]


# Names


@pytest.mark.parametrize(
    ("name", "group", "short"),
    [
        (GEMM, "matmul", GEMM[:61] + "..."),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", "matmul", "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT"),
        (
            "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_128x64_32x6_tn_align8>(X)",
            "matmul",
            "Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_128x64_...",
        ),
        (FLASH, "attention", "flash_fwd_kernel<Flash_fwd_kernel_traits>"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80(Params)", "attention", "fmha_cutlassF_bf16_aligned_64x128_rf_sm80"),
        (SCATTER, "communication", "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL"),
        ("Memcpy PtoP (Device -> Device)", "communication", "Memcpy PtoP (Device -> Device)"),
        (PAGED, "copy", PAGED),
        ("Memset (Device)", "copy", "Memset (Device)"),
        (ADD, "elementwise", "vectorized_elementwise_kernel<CUDAFunctor_add>"),
        (ADAM, "optimizer and clipping", "multi_tensor_apply_kernel<FusedAdamMathFunctor>"),
        ("triton_for_fused_1", "optimizer and clipping", "triton_for_fused_1"),
        (
            "triton_red_fused__to_copy_mul_rms_norm_scaled_dot_product_attention_2",
            "reduction",
            "triton_red_fused__to_copy_mul_rms_norm_scaled_dot_product_att...",
        ),
        ("triton_poi_fused_mul_silu_3", "elementwise", "triton_poi_fused_mul_silu_3"),
        ("triton_tem_fused_mm_7", "matmul", "triton_tem_fused_mm_7"),
        ("_dense_kernel", "hardware effects", "_dense_kernel"),
        ("_chunk_kernel", "hardware effects", "_chunk_kernel"),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float> >(X)", "reduction", "reduce_kernel"),
        ("what_is_this", "other", "what_is_this"),
        ("", "other", ""),
    ],
)
def test_kernels_have_a_kind_and_a_short_name(name, group, short):
    assert kernel_group(name) == group
    assert short_name(name) == short


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("aten::addmm", "matmul"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("gloo:all_reduce", "communication"),
        ("c10d::_allgather_base_", "communication"),
        ("_c10d_functional::wait_tensor", "communication"),
        ("record_param_comms", "communication"),
        ("Torch-Compiled Region: 0/0", "compiled code"),
        ("## Call CompiledFxGraph fjuocco34 ##", "compiled code"),
        ("aten::copy_", "copy"),
        ("aten::_log_softmax", "reduction"),
        ("aten::normal_", "elementwise"),
        ("aten::mul", "elementwise"),
        ("MmBackward0", "autograd"),
        ("ProfilerStep#3", "other"),
        ("fsdp::all_gather_copy_in", "copy"),
    ],
)
def test_operators_have_a_kind(name, group):
    assert operator_group(name) == group


# Damaged files


def refusal(path: Path) -> str:
    with pytest.raises(TraceError) as error:
        summarize(path)
    assert str(path) in str(error.value)
    return str(error.value)


def test_damaged_and_foreign_files_are_refused(tmp_path, gpu_trace):
    file = tmp_path / "bad.json.gz"
    whole = gpu_trace.read_bytes()
    for size in (3, 20, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        assert "cut short" in refusal(file)
    file.write_bytes(whole[:100] + b"????" + whole[104:])
    assert "damaged" in refusal(file)
    file.write_bytes(gzip.decompress(whole)[:-40])
    assert "cut short" in refusal(file)
    file.write_bytes(bytes(range(256)))
    refusal(file)
    for text in ("", "null", "3", '"text"', '{"traceEvents": 7}', "{}", "[" * 100_000):
        file.write_text(text)
        refusal(file)
    write_trace(file, [])
    assert "empty" in refusal(file)
    write_trace(file, [{"ph": "i", "name": "x"}, 3, None, "x", {"ph": "X", "name": "y", "ts": "soon", "dur": 1}])
    assert "none of its 5 entries" in refusal(file)
    write_trace(file, [entry("something", "unheard_of", 0, 5)])
    assert "nothing to sum up" in refusal(file)
    write_trace(file, [kernel(GEMM, 5, 5, 7)])
    assert "took any time" in refusal(file)


def test_unknown_and_malformed_events_change_nothing(tmp_path, gpu_trace):
    odd = [
        {"ph": "X", "cat": "kernel", "name": "no time"},
        {"ph": "X", "cat": "kernel", "name": "backwards", "ts": 20, "dur": -5},
        {"ph": "X", "cat": "kernel", "name": "boolean", "ts": True, "dur": True},
        {"ph": "X", "cat": "kernel", "name": "endless", "ts": float("inf"), "dur": 1.0},
        {"ph": "s", "cat": "ac2g", "id": 1, "ts": 5},
        {"ph": "X", "cat": "overhead", "name": "CUPTI buffers", "ts": 0, "dur": 500, "args": "none"},
        {"ph": "X", "cat": "unheard_of", "ts": 0, "dur": 500, "pid": None, "tid": [1]},
        [1, 2],
    ]
    about = {"rank": 3, "world_size": 8}
    other = write_trace(tmp_path / "odd.json", [*odd, *gpu_events()], distributedInfo=about)
    expected, found = summarize(gpu_trace), summarize(other)
    found.file = expected.file
    assert found == expected


def test_a_plain_list_of_events_is_a_trace_too(tmp_path, gpu_trace):
    file = tmp_path / "list.json"
    file.write_text(json.dumps(gpu_events()))
    assert summarize(file).idle_ms == summarize(gpu_trace).idle_ms
    assert read_trace(file).rank is None


# For people


def test_the_text_gives_figures_per_step(gpu_trace):
    text = trace_text(summarize(gpu_trace), top=2)
    assert "rank 3 of 8, gpu, 2 steps (10 to 11): 0.075 ms per step" in text
    assert "communication, exposed                    0.015  20.0%" in text
    assert "idle                                      0.033  43.3%" in text or "0.032" in text
    rows = text.split("kernels ")[1].split("\n\n")[0].splitlines()
    assert len(rows) == 3, "the heading and two kernels"
    assert "largest of 3 gaps" in text
    assert "at 0.055 ms" in text


def test_traces_without_marked_steps_are_told_as_a_whole(tmp_path):
    text = trace_text(summarize(write_trace(tmp_path / "t.json", [kernel(GEMM, 0, 2000, 7)])))
    assert "gpu: 2.000 ms; steps are not marked" in text


def run_command(capsys, *arguments: str) -> str:
    main(["trace", *arguments])
    return capsys.readouterr().out


def test_the_command_prints_one_or_several_traces(capsys, gpu_trace, tmp_path):
    other = write_trace(tmp_path / "cpu.json", cpu_events())
    assert run_command(capsys, str(gpu_trace)).rstrip() == trace_text(summarize(gpu_trace))
    both = run_command(capsys, str(gpu_trace), str(other))
    assert comparison_text([summarize(gpu_trace), summarize(other)]) in both
    (record,) = json.loads(run_command(capsys, str(gpu_trace), "--json", "--top", "1"))
    found = summarize(gpu_trace)
    assert record["exposed_communication_ms"] == found.exposed_communication_ms
    assert len(record["top"]) == 1
    assert record.keys() == Summary.__dataclass_fields__.keys()


def test_the_command_refuses_what_is_no_trace_with_exit_code_2(capsys, tmp_path, gpu_trace):
    cut = tmp_path / "cut.json.gz"
    cut.write_bytes(gpu_trace.read_bytes()[:200])
    for file, words in ((cut, "cut short"), (tmp_path / "none.json", "No such file"), (tmp_path, "directory")):
        with pytest.raises(SystemExit) as end:
            main(["trace", str(file)])
        assert end.value.code == 2
        told = capsys.readouterr().err
        assert words in told
        assert str(file) in told


def test_reading_a_trace_needs_no_torch(gpu_trace):
    code = (
        "import sys; from launch.cli import main; "
        f"main(['trace', {str(gpu_trace)!r}]); sys.exit('torch' in sys.modules)"
    )
    assert "gpu, 2 steps" in run_python("-c", code).stdout
