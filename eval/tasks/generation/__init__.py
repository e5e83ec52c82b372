"""Generation: its settings and its registration."""

from __future__ import annotations

from pydantic import Field, model_validator

from data_pipeline.errors import UserError
from data_pipeline.sources.reading import Quotes
from eval.task import ModuleTask, Row, Settings, quotes_field, register
from eval.tasks.generation.decodings import Decoding


class GenerateSettings(Settings):
    """Prompts, ways of decoding, and what the texts are measured with."""

    prompt: tuple[str, ...] = Field((), description="own prompts; left out: held-out text")
    prompts: str | None = Field(
        None, description="file of prompts: .txt, one a line, or records as for data prepare; left out: held-out text"
    )
    prompt_field: str = Field("prompt", description="field or column of the prompts in a file of records")
    quotes: Quotes = quotes_field()
    num_samples: int = Field(16, ge=1, description="samples from held-out text")
    prompt_tokens: int = Field(32, ge=1, description="tokens of held-out text before a continuation")
    max_new_tokens: int = Field(64, ge=1, description="longest continuation")
    temperature: float = Field(0.8, ge=0, description="0 takes the likeliest token")
    top_k: int = Field(50, ge=0, description="draw among so many likeliest tokens; 0: among all")
    top_p: float = Field(1.0, gt=0, le=1, description="draw among the likeliest tokens that reach this probability")
    repetition_penalty: float = Field(1.0, gt=0, description="above 1: what was written gets less likely")
    decodings: tuple[str, ...] = Field(
        ("greedy", "top_p=0.95"),
        description="further ways of decoding beside that one, each from temperature 1 and all tokens: greedy, "
        "top_p=0.95, top_k=50,temperature=0.7, repetition_penalty=1.2, beams=4",
    )
    reference: str | None = Field(
        None, description="another causal checkpoint, of any tokenizer, that judges the texts too; left out: none"
    )
    features: str | None = Field(
        None,
        description="checkpoint whose hidden states stand for the texts in MAUVE and coherence; left out: the "
        "reference, else the model itself",
    )
    copies: str | None = Field(
        None, description="shards of the training text, searched for copied passages; left out: not searched"
    )
    seed: int = Field(0, ge=0, description="of random choices")
    masks: int = Field(3, ge=1, description="tokens hidden in each passage (masked models)")

    @model_validator(mode="after")
    def _check(self) -> GenerateSettings:
        if self.prompt and self.prompts:
            raise ValueError("give prompts as text (--prompt) or as a file (--prompts), not both")
        try:
            self.ways()
        except UserError as error:
            raise ValueError(str(error)) from None
        return self

    def ways(self) -> list[Decoding]:
        """All ways of decoding, each once, the main one first."""
        main = Decoding(self.temperature, self.top_k, self.top_p, self.repetition_penalty)
        return list(dict.fromkeys([main, *map(Decoding.parse, self.decodings)]))


@register
class Generation(ModuleTask):
    """See ``task``."""

    name = "generate"
    summary = "what the model writes: samples, and their statistics beside those of real text"
    settings = GenerateSettings
    module = "eval.tasks.generation.task"
    order, section = 30, 18
    heading = "Samples"
    lead = "What the model writes or fills in, with the same statistics of real text beside its own."
    rows = (
        Row("distinct_2", "Generated text, distinct-2"),
        Row("repetition_4", "Generated text, repeated 4-grams"),
        Row("top_1", "Hidden words guessed right at once"),
    )

    def longest(self, settings: GenerateSettings) -> int:
        """Of the prompts that it draws itself; the user's own may be longer."""
        return settings.prompt_tokens + settings.max_new_tokens
