"""Check running vLLM servers against the model itself: ids, logprobs, crops, cancelling, pushed weights.

usage: check_vllm.py FOLDER SCRATCH ADDRESS [ADDRESS ...]

FOLDER is the model in the released layout that the servers serve (docs/vllm.md says how to start one), SCRATCH a folder
for pushed weights that they see too. Prints a line a check, and exits with 1 when one fails.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from looktwice.engine.interface import Continuation, Request, Segment
from looktwice.engine.sampling import Sampling
from looktwice.engine.vllm import ServedSegment, VllmEngine
from looktwice.messages import question_about
from looktwice.model.adapters import add_lora, base_of, trained_parameters
from looktwice.model.modeling import Ovis2_5ForConditionalGeneration
from looktwice.model.weights import load_model
from looktwice.processing.packing import pack
from looktwice.processing.processor import Example, Ovis2_5Processor
from looktwice.rollout.crop_tool import CropTool, observed
from looktwice.rollout.episode import EpisodeRules, start_episodes

TOLERANCE = 1e-4
"""Nats; a server in float32 is needed for that."""
CALLS = ("<tool_call>[10, 10, 200, 200]</tool_call>", "<tool_call>[40, 20, 300, 230]</tool_call>")


@dataclass
class Script:
    """A driver that answers each segment with a crop, until its calls are used up."""

    processor: Ovis2_5Processor
    image: Image.Image
    example: Example
    calls: Sequence[str] = ()
    max_new_tokens: int = 12
    segments: list[ServedSegment] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)
    heard: list[int] = field(default_factory=list)

    def hear(self, token: int, logprob: float) -> None:
        self.heard.append(token)

    def respond(self, segment: Segment) -> Continuation | None:
        assert isinstance(segment, ServedSegment)
        self.segments.append(segment)
        self.example.append(segment.ids, is_trained=True)
        if len(self.segments) > len(self.calls):
            return None
        ids, images = observed(
            CropTool(self.processor).look(self.calls[len(self.segments) - 1], [self.image]), self.processor
        )
        self.example.append(ids, is_trained=False)
        self.example.images += images
        return Continuation(ids=ids, images=images, max_new_tokens=self.max_new_tokens)

    def fail(self, error: Exception) -> None:
        self.errors.append(error)


class Checks:
    """The servers, the model they serve, and one picture."""

    def __init__(self, folder: str, scratch: Path, addresses: Sequence[str]) -> None:
        self.scratch = scratch
        self.addresses = addresses
        self.model = base_of(load_model(folder)).eval()
        self.processor = Ovis2_5Processor.from_pretrained(folder)
        noise = np.random.default_rng(time.time_ns()).integers(0, 256, (240, 320, 3), dtype=np.uint8)
        self.image = Image.fromarray(noise)  # another one each time: no cache has it
        asked = question_about("Which digit is on the red tile?" + " Look twice." * 30, self.image)
        self.prompt = start_episodes(asked, self.processor, EpisodeRules())[0].prompt
        self.engine = VllmEngine(addresses, self.model.config)

    def play(
        self, *, count: int = 1, calls: Sequence[str] = CALLS, prompt: Example | None = None, **options: object
    ) -> list[Script]:
        prompt = prompt or self.prompt
        scripts = [Script(self.processor, self.image, prompt.copy(), calls) for _ in range(count)]
        fields = {"sampling": Sampling(temperature=0), "max_new_tokens": 12, **options}
        self.engine.run([Request(prompt=prompt, drivers=scripts, **fields)])  # type: ignore[arg-type]
        for script in scripts:
            if script.errors:
                raise script.errors[0]
            assert script.heard == [token for segment in script.segments for token in segment.ids]
        return scripts

    def gaps(
        self, scripts: Sequence[Script], model: Ovis2_5ForConditionalGeneration, temperature: float = 1.0
    ) -> tuple[float, float, float]:
        """The largest differences in nats from the model itself: plain, drawn; and how far ids are behind its best."""
        plain_gap = drawn_gap = behind = 0.0
        for script in scripts:
            inputs = pack([script.example]).model_inputs()
            places = torch.tensor(script.example.loss_mask).nonzero()[:, 0]
            del inputs["loss_mask"]
            with torch.no_grad():
                scores = model(**inputs).logits[0, places - 1].float() / temperature
            ids = torch.tensor(script.example.input_ids)[places, None]
            plain = scores.log_softmax(-1).gather(1, ids)[:, 0]
            scores[:, list(model.config.visual_token_ids)] = -torch.inf
            drawn = scores.log_softmax(-1).gather(1, ids)[:, 0]
            told_plain = torch.tensor([value for segment in script.segments for value in segment.logprobs])
            told_drawn = torch.tensor([value for segment in script.segments for value in segment.drawn_logprobs])
            plain_gap = max(plain_gap, float((told_plain - plain).abs().max()))
            drawn_gap = max(drawn_gap, float((told_drawn - drawn).abs().max()))
            behind = max(behind, float((scores.amax(-1) - scores.gather(1, ids)[:, 0]).max()))
        return plain_gap, drawn_gap, behind

    def greedy(self) -> str:
        scripts = self.play(count=4)
        plain, _, behind = self.gaps(scripts, self.model)
        assert max(plain, behind) <= TOLERANCE, (plain, behind)
        assert len({tuple(script.example.input_ids) for script in scripts}) == 1
        num_ids = sum(map(len, (segment.ids for script in scripts for segment in script.segments)))
        return (
            f"{num_ids} greedy ids of 4 siblings with 2 crops each are the model's own; logprobs differ by {plain:.1e}"
        )

    def without_images(self) -> str:
        """A video, and text alone."""
        told = []
        video, text = Example(), Example()
        for prompt in (video, text):
            prompt.append(self.processor.template.encode("user\n"), is_trained=False)
        frames = [self.image.rotate(angle) for angle in (0, 90, 180)]
        self.processor.append_image(video, self.processor.patch_video(frames))
        for kind, prompt in (("a video of 3 frames", video), ("text", text)):
            prompt.append(self.processor.template.encode("\nWhich digit?\nassistant\n"), is_trained=False)
            plain, _, behind = self.gaps(self.play(calls=(), prompt=prompt), self.model)
            assert max(plain, behind) <= TOLERANCE, (kind, plain, behind)
            told.append(f"about {kind} logprobs differ by {plain:.1e}")
        return ", ".join(told)

    def sampled(self) -> str:
        told = []
        for temperature in (0.7, 1.0, 1.3):
            scripts = self.play(count=4, sampling=Sampling(temperature=temperature), seed=7)
            again = self.play(count=4, sampling=Sampling(temperature=temperature), seed=7)
            ids = [script.example.input_ids for script in scripts]
            assert ids == [script.example.input_ids for script in again], "the same seed gave other ids"
            (alone,) = self.play(sampling=Sampling(temperature=temperature), seed=7)
            assert ids[0] == alone.example.input_ids, "a rollout's ids depend on its siblings"
            assert len(set(map(tuple, ids))) > 1, "siblings drew the same numbers"
            plain, drawn, _ = self.gaps(scripts, self.model, temperature)
            assert max(plain, drawn) <= TOLERANCE, (temperature, plain, drawn)
            told.append(f"{temperature:g}: plain {plain:.1e}, drawn {drawn:.1e}")
        return "at temperature " + "; ".join(told) + "; the same seed gives the same ids, alone or not"

    def truncated(self) -> str:
        (script,) = self.play(sampling=Sampling(temperature=1.0, top_p=0.5), seed=3)
        told = [x for segment in script.segments for x in segment.logprobs]
        drawn = [x for segment in script.segments for x in segment.drawn_logprobs]
        assert all(map(math.isnan, told)) and all(x <= 0 for x in drawn)
        return "under top-p the plain logprobs are not known (NaN), and those drawn from are"

    def reused(self) -> str:
        """A second turn against the first: what its prefix cache serves, and a picture that the server forgot."""
        before = self._counted("vllm:prefix_cache_hits_total"), self._counted("vllm:prefix_cache_queries_total")
        (script,) = self.play(calls=CALLS[:1])
        hits = self._counted("vllm:prefix_cache_hits_total") - before[0]
        asked = self._counted("vllm:prefix_cache_queries_total") - before[1]
        assert hits > 0, "the prefix cache served nothing: prompts are shorter than its block, or it is off"
        for address in self.addresses:
            connection = HTTPConnection(address.removeprefix("http://"))
            connection.request("POST", "/reset_mm_cache")
            assert connection.getresponse().status == 200
        (again,) = self.play(calls=CALLS[:1])
        assert again.example.input_ids == script.example.input_ids
        return f"{hits:.0f} of {asked:.0f} prompt ids from the cache; a picture that was forgotten is sent again"

    def _counted(self, name: str) -> float:
        """A counter of all servers together."""
        total = 0.0
        for address in self.addresses:
            connection = HTTPConnection(address.removeprefix("http://"))
            connection.request("GET", "/metrics")
            lines = connection.getresponse().read().decode().splitlines()
            total += sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))
        return total

    def stopped(self) -> str:
        (free,) = self.play(calls=())
        ids = free.segments[0].ids
        (by_id,) = self.play(calls=(), stop_ids=frozenset({ids[4]}))
        assert (by_id.segments[0].ids, by_id.segments[0].stop) == (ids[: ids.index(ids[4]) + 1], "stop_id")
        text = self.processor.decode(ids[:6])[-3:]
        (by_text,) = self.play(calls=(), stop_texts=(text,))
        stopped = by_text.segments[0]
        assert stopped.stop == "stop_text" and text in self.processor.decode(stopped.ids), stopped
        (banned,) = self.play(calls=(), banned_ids=frozenset(ids[:2]))
        assert not set(ids[:2]) & set(banned.segments[0].ids)
        return "stop ids and stop texts end a segment and stay in it; banned ids are not drawn"

    def cut(self) -> str:
        script = Script(self.processor, self.image, self.prompt.copy())
        late = Script(self.processor, self.image, self.prompt.copy())
        whole = {"max_new_tokens": 10_000, "sampling": Sampling(temperature=0)}
        (number,) = self.engine.submit(Request(prompt=self.prompt, drivers=[script], **whole))  # type: ignore[arg-type]
        self.engine.submit(Request(prompt=self.prompt, drivers=[late], max_seconds=0.5, **whole))  # type: ignore[arg-type]
        while not script.heard:
            self.engine.step()
        self.engine.cancel(number)
        while self.engine.step():
            pass
        assert [segment.stop for segment in script.segments] == ["cancelled"]
        assert late.segments[0].stop in ("seconds", "no_room") and not late.errors
        (full,) = self.play(calls=(), max_new_tokens=10_000)
        assert full.segments[0].stop == "no_room"
        num_ids = len(script.segments[0].ids)
        return f"cancelled after {num_ids} ids; cut for {late.segments[0].stop}; no room after {len(full.example)}"

    def weights(self) -> str:
        """Twice: a LoRA adapter that changes the answer, then the model as it was."""
        adapted = add_lora(copy.deepcopy(self.model), r=4, alpha=8)
        with torch.no_grad():
            for name, parameter in trained_parameters(adapted):
                if "lora_B" in name:
                    parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        told = []
        for version, model in (("1", adapted.eval()), ("2", self.model)):
            self.engine.push_weights(model, self.scratch / "weights", version)
            (script,) = self.play()
            versions = {v for segment in script.segments for v in segment.weight_versions}
            plain, _, behind = self.gaps([script], base_of(model))
            assert versions == {version} and max(plain, behind) <= TOLERANCE, (versions, plain, behind)
            told.append(f"version {version}: logprobs differ by {plain:.1e}")
            if version == "1":
                assert self.gaps([script], self.model)[0] > 100 * TOLERANCE, "the adapter changes nothing"
        return "pushed twice (an adapter merged, then the model); " + ", ".join(told)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("scratch", type=Path)
    parser.add_argument("addresses", nargs="+")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    checks = Checks(args.folder, args.scratch, args.addresses)
    failed = 0
    parts: tuple[Callable[[], str], ...] = (
        checks.greedy,
        checks.without_images,
        checks.sampled,
        checks.truncated,
        checks.reused,
        checks.stopped,
        checks.cut,
        checks.weights,
    )
    for check in parts:
        try:
            print(f"{check.__name__}: {check()}", flush=True)
        except AssertionError as error:
            failed += 1
            print(f"{check.__name__}: FAILED {error}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
