"""Result and gradients of training's attention against f64, ours and PyTorch's side by side.

Both round weights of the softmax and the result to bf16, and sum in f32, so that their errors are of one kind:
ours may be at most 1.5 times PyTorch's relative error (the norm of the error over the norm of the truth) and
its largest error at most 3 times PyTorch's, a maximum being noisier than a norm. Ours returns gradients in f32.
"""

import json
import math

from .process import ROOT, run

SHAPES = ["llama-3.1-8b", "llama-3.2-1b"]  # head dimensions 128 and 64
RELATIVE, MOST = 1.5, 3.0
TENSORS = 6
# Divides all lengths of the timings that come before the dump, so that they take no time.
SCALE = 8192


def attention(check, step) -> None:
    step.notes.append((__doc__ or "").split("\n\n", 1)[1].replace("\n", " "))
    if check.torch is None:
        return step.not_run(f"{check.no_torch}: nothing to compare with")
    columns = [
        "case",
        "tensor",
        "our most",
        "SDPA's most",
        "our mean",
        "SDPA's mean",
        "our relative",
        "SDPA's relative",
    ]
    table = step.table("Errors against f64", columns, file="errors")
    bad = []
    for shape in SHAPES[-1:] if check.rehearse else SHAPES:
        path = check.temporary / f"{shape}.safetensors"
        command = [check.binaries.program(), "bench", "--shape", shape, "--device", check.device, "--layers", "1"]
        command += ["--only", "attention", "--scale", SCALE, "--dump", path]
        dumped = run(command, check.left(step), check.env)
        check.report.log(f"bench --shape {shape} --dump: {dumped.end()}", dumped.output)
        if not path.is_file():
            step.excerpt("cartouche bench --dump", dumped.output)
            return step.failed(f"{shape}: no dump, {dumped.end()}")
        command = [check.python, "-m", "gpu_check.attention_errors", path, check.device]
        compared = run(command, check.left(step), {"PYTHONPATH": str(ROOT / "scripts")})
        lines = [json.loads(line) for line in compared.output.splitlines() if line.startswith("{")]
        if len(lines) != TENSORS:
            step.excerpt("attention_errors.py", compared.output)
            return step.failed(f"{shape}: PyTorch's part: {compared.end()}")
        for line in lines:
            case = "{dtype} tokens={tokens} prefix={prefix} heads={heads} kv_heads={kv_heads} head_dim={dim}"
            ours, sdpa = line["ours"], line["sdpa"]
            pairs = [error[key] for key in ("most", "mean", "relative") for error in (ours, sdpa)]
            table.rows.append([case.format(**line), line["tensor"], *pairs])
            if not fine(ours, sdpa):
                bad.append(f"{shape} {line['tensor']}")
    if bad:
        step.failed("larger errors than PyTorch's allow: " + ", ".join(bad))
    else:
        step.passed(
            f"{len(table.rows)} tensors; ours against SDPA's relative error: at most "
            f"{max(row[6] / row[7] for row in table.rows):.2f} times"
        )


def fine(ours: dict, sdpa: dict) -> bool:
    known = all(math.isfinite(value) for value in [*ours.values(), *sdpa.values()])
    return known and ours["relative"] <= RELATIVE * sdpa["relative"] and ours["most"] <= MOST * sdpa["most"]
