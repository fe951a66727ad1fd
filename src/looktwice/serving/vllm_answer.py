"""A greedy answer by vLLM: run as a script in an environment that has vLLM and need not have looktwice.

usage: vllm_answer.py FOLDER REQUEST ANSWER

REQUEST is a JSON file: `input_ids` (one <image> id for each picture, vLLM writes out its visual tokens), `pictures`
(their paths in order), `max_new_tokens`, `stop_ids` and `dtype`. Pictures stand at the size the model sees, sides in
multiples of 32 and from 448 x 448 to 1792 x 1792 pixels; vLLM resizes all others.
ANSWER becomes a JSON file: `ids` (a stop id included), `logprobs` (one for each id) and `vllm` (its version).
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

QUIET_DEFAULTS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
"""One process, 1 GiB of cache on a CPU, and nothing sent or fetched; each holds unless the caller sets it."""


def answer(folder: str, request: dict[str, Any]) -> dict[str, Any]:
    """What vLLM answers, as ANSWER holds it."""
    import vllm  # reads the environment when imported
    from PIL import Image

    images = [Image.open(path).convert("RGB") for path in request["pictures"]]
    num_visual_tokens = sum(image.width * image.height // 32**2 + 2 for image in images)
    model = vllm.LLM(
        folder,
        trust_remote_code=True,  # the config classes in the folder
        dtype=request["dtype"],
        max_model_len=len(request["input_ids"]) + num_visual_tokens + request["max_new_tokens"],
        max_num_seqs=1,
        limit_mm_per_prompt={"image": len(images), "video": 0},
        skip_mm_profiling=True,  # it would encode a picture of the largest size
        enforce_eager=True,
    )
    greedy = vllm.SamplingParams(
        temperature=0.0, max_tokens=request["max_new_tokens"], stop_token_ids=request["stop_ids"], logprobs=0
    )
    prompt = {"prompt_token_ids": request["input_ids"], "multi_modal_data": {"image": images}}
    written = model.generate([prompt], greedy, use_tqdm=False)[0].outputs[0]
    logprobs = [of_step[token].logprob for token, of_step in zip(written.token_ids, written.logprobs)]
    return {"ids": list(written.token_ids), "logprobs": logprobs, "vllm": vllm.__version__}


if __name__ == "__main__":
    for name, value in QUIET_DEFAULTS.items():
        os.environ.setdefault(name, value)
    folder, request, target = sys.argv[1:]
    result = answer(folder, json.loads(Path(request).read_text(encoding="utf-8")))
    Path(target).write_text(json.dumps(result), encoding="utf-8")
