"""The released class name for transformers' AutoModelForCausalLM with trust_remote_code: it gives looktwice's model.

A copy of this file stands in every saved folder and is run from there: pip install looktwice.
"""

from typing import Any

from looktwice.model.modeling import Ovis2_5ForConditionalGeneration


class Ovis2_5:
    """No model itself: what it loads is an Ovis2_5ForConditionalGeneration, as if looktwice had been imported."""

    from_pretrained = Ovis2_5ForConditionalGeneration.from_pretrained

    @classmethod
    def register_for_auto_class(cls, *_: Any, **__: Any) -> None:
        """Nothing: transformers would copy code into what is saved, which the model sees to by itself."""
