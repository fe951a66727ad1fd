"""Look-twice rollouts of the tiny model: all together against one at a time, and the cache against recomputing."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from looktwice.rollout.builtin_engine import BuiltinEngine
from looktwice.rollout.engine import Continuation, Request, Segment
from looktwice.rollout.sampling import Sampling
from measure import medians, publish

from looktwice.config import InferenceConfig
from looktwice.data.sample import Sample
from looktwice.demo.task import make_dataset
from looktwice.formats.sample_file import read_samples
from looktwice.inference import OvisInference
from looktwice.model.weights import TINY
from looktwice.rollout.crop_tool import CropTool
from looktwice.rollout.episode import EpisodeRules, start_episodes

NUM_PROMPTS, GROUP, NUM_TURNS, TURN_TOKENS = 8, 8, 3, 16
CALL = "<tool_call>[40, 40, 90, 90]</tool_call>"


class Script:
    """Fixed turns of fixed length with a crop after each, so that every way does the same work."""

    def __init__(self, inference: OvisInference, samples: list[Sample]) -> None:
        self.inference = inference
        rules = EpisodeRules()
        self.episodes = [start_episodes(sample.prompt, inference.processor, rules)[0] for sample in samples]
        tool = CropTool(inference.processor)
        self.crops = [tool.look(CALL, episode.image).image for episode in self.episodes]

    def engine(self, max_rows: int) -> BuiltinEngine:
        return BuiltinEngine(
            self.inference.model,
            sampling=Sampling(),
            stop_ids=[],
            forbidden_ids=self.inference.processor.config.visual_token_ids,
            max_rows=max_rows,
            generator=torch.Generator().manual_seed(0),
        )

    def from_cache(self, max_rows: int, *, share_prompt: bool) -> None:
        """Every turn continues from the cache with the crop's pixels alone."""
        group = GROUP if share_prompt else 1
        turns: dict[int, int] = {}

        def respond(number: int, segment: Segment) -> Continuation | None:
            turns[number] = turns.get(number, 0) + 1
            if turns[number] == NUM_TURNS:
                return None
            crop = self.crops[number // GROUP]
            assert crop is not None
            ids = self.inference.processor.image_ids(crop)
            return Continuation(ids=ids, images=[crop], max_new_tokens=TURN_TOKENS)

        prompts = [episode.prompt for episode in self.episodes for _ in range(GROUP // group)]
        requests = [Request(prompt=prompt, num_rollouts=group, max_new_tokens=TURN_TOKENS) for prompt in prompts]
        self.engine(max_rows).run(requests, respond)

    def recomputing(self) -> None:
        """Every turn starts again from the prompt, the picture and all earlier crops."""
        contexts = [episode.prompt.copy() for episode in self.episodes for _ in range(GROUP)]
        for turn in range(NUM_TURNS):
            written: dict[int, list[int]] = {}

            def respond(number: int, segment: Segment, written: dict[int, list[int]] = written) -> None:
                written[number] = segment.ids

            requests = [Request(prompt=context, num_rollouts=1, max_new_tokens=TURN_TOKENS) for context in contexts]
            self.engine(NUM_PROMPTS * GROUP).run(requests, respond)
            for number, context in enumerate(contexts):
                context.append(written[number], is_trained=True)
                crop = self.crops[number // GROUP]
                if turn + 1 < NUM_TURNS and crop is not None:
                    self.inference.processor.append_image(context, crop)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        files = make_dataset(Path(folder), num_train=NUM_PROMPTS, num_rl=1, num_eval=1)
        script = Script(OvisInference(InferenceConfig(model_path=TINY)), read_samples(files.train, folder))
    ways = {
        "together": lambda: script.from_cache(NUM_PROMPTS * GROUP, share_prompt=True),
        "one_at_a_time": lambda: script.from_cache(1, share_prompt=False),
        "recomputing_each_turn": script.recomputing,
    }
    seconds = medians(ways, repeats=3)
    num_tokens = NUM_PROMPTS * GROUP * NUM_TURNS * TURN_TOKENS
    publish(
        {
            "sampled_tokens_per_s": num_tokens / seconds["together"],
            "one_at_a_time_vs_together": seconds["one_at_a_time"] / seconds["together"],
            "recomputing_vs_cache": seconds["recomputing_each_turn"] / seconds["together"],
        }
    )


if __name__ == "__main__":
    main()
