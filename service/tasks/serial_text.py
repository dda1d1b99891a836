"""A text that is streamed while it is written, prompt after prompt: one prompt's text, or those of the pieces of one.

Knows neither HTTP nor what the text is of. Runs in the API process; to be closed by whoever made it.
"""

from collections.abc import AsyncGenerator, Sequence

from service.engine.models import LoadedModel
from service.tasks.generation import Delta, Generation, Prompt
from service.tasks.instructing import Spent, Writer


class SerialText:
    """Iterate for its deltas. The next prompt is begun when the one before it has ended; the first is under way."""

    def __init__(
        self, writer: Writer, model: LoadedModel, prompts: Sequence[Prompt], joints: Sequence[str] = ()
    ) -> None:
        """`joints` stand between the prompts' texts. Raises what the engine raises that refuses the first."""
        assert len(joints) == len(prompts) - 1
        self._writer = writer
        self._model = model
        self._prompts = prompts
        self._joints = joints
        self._parts: list[Generation] = [writer.start(model, prompts[0])]

    async def __aiter__(self) -> AsyncGenerator[Delta, None]:
        reason: str | None = None
        for index in range(len(self._prompts)):
            if index:
                yield Delta(0, text=self._joints[index - 1])
                self._parts.append(self._writer.start(self._model, self._prompts[index]))
            last = index == len(self._prompts) - 1
            async for delta in self._parts[index]:
                if delta.finish_reason is not None:
                    reason = delta.finish_reason if reason in (None, "stop") else reason
                    delta.finish_reason = reason if last else None
                yield delta

    def close(self) -> None:
        """Cancels whatever has not ended."""
        for part in self._parts:
            part.close()

    @property
    def spent(self) -> Spent:
        """Of what has been written so far."""
        parts = [Spent.by(part.usage, part.prompts[0]) for part in self._parts]
        return Spent.total(part.as_piece() for part in parts) if len(self._prompts) > 1 else parts[0]
