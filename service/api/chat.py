"""`POST /v1/chat/completions`: a conversation's next message, in OpenAI's shape, with tools, whole or as a stream.

HTTP only: templates, tool formats and streams of tokens are the tasks'. Runs in the API process, on the event loop.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from fastapi import APIRouter, Request
from starlette.responses import Response

from model.batch import Grammar, TokenLogprobs
from service.api.answers_openai import (
    DONE,
    AnswerFunction,
    AnswerMessage,
    AnswerToolCall,
    CallChunk,
    CallFunctionChunk,
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatDelta,
    ChatLogprobs,
    ChunkEncoder,
    UsageAnswer,
)
from service.api.generating import (
    checked_grammar,
    engine_of,
    grammar_of,
    new_id,
    note_task,
    request_options,
    respond,
    sampling_options,
)
from service.api.schemas_openai import ChatBody, NamedToolChoice
from service.api.token_logprobs import chat_logprobs
from service.engine.models import LoadedModel
from service.errors import InvalidRequest
from service.tasks.chat import Conversation, ToolUse, chat_prompt, tool_use
from service.tasks.generation import Delta, Generation, Prompt, start_generation
from service.tasks.prompts import truncated
from service.tasks.sampling import sampling_params
from service.tasks.tool_calls import CallPiece, Reading, ToolCallParser

router = APIRouter(prefix="/v1", tags=["generation"])


@router.post("/chat/completions", response_model=ChatAnswer, summary="Answer a conversation")
async def create_chat_completion(request: Request, body: ChatBody) -> Response:
    engine = engine_of(request)
    model = engine.resolve(body.model, "chat")
    note_task(request, "chat", model, None)
    options = request_options(request, body, "chat")
    tools = _tool_use(body, model)
    prompt = await _prompt(request, body, model, tools, options.deadline)
    generation = start_generation(engine, model, [prompt], options, n=body.n)
    return await respond(request, generation, ChatWriter(body, generation, tools), body)


def conversation_of(body: ChatBody) -> Conversation:
    return Conversation(
        messages=[message.model_dump(exclude_none=True) for message in body.messages],
        tools=[] if body.tool_choice == "none" else [tool.model_dump(exclude_none=True) for tool in body.tools],
        documents=body.documents,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        template_variables=body.chat_template_kwargs,
    )


def _tool_use(body: ChatBody, model: LoadedModel) -> ToolUse | None:
    asked = body.tool_choice or "auto"
    choice, name = ("named", asked.function.name) if isinstance(asked, NamedToolChoice) else (asked, None)
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools]
    return tool_use(model, tools, choice=choice, name=name, parallel=body.parallel_tool_calls)


async def _prompt(
    request: Request, body: ChatBody, model: LoadedModel, tools: ToolUse | None, deadline: float | None
) -> Prompt:
    """Checks what must fit together, then makes the ids and the sampling parameters."""
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("top_logprobs goes with logprobs: true", param="top_logprobs")
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        message = "max_tokens and max_completion_tokens differ: give one of them"
        raise InvalidRequest(message, param="max_completion_tokens")
    grammar = await _grammar(request, body, tools, deadline)
    asked = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    options = sampling_options(
        body, max_tokens=asked, logprobs=(body.top_logprobs or 0) if body.logprobs else None, grammar=grammar
    )
    ids, num_truncated = truncated(await chat_prompt(model, conversation_of(body)), body.truncate_prompt_tokens)
    if not ids:
        raise InvalidRequest("the chat template makes an empty prompt of these messages", param="messages")
    sampling = sampling_params(
        options,
        model,
        len(ids),
        default_max_tokens=None,
        prompt_param="messages",
        max_tokens_param="max_tokens" if body.max_tokens is not None else "max_completion_tokens",
    )
    return Prompt(
        ids=ids,
        sampling=sampling,
        stop=options.stop,
        skip_special_tokens=body.skip_special_tokens,
        keep_special=frozenset() if tools is None else tools.keep_special,
        continues=body.continue_final_message,
        num_truncated=num_truncated,
    )


async def _grammar(request: Request, body: ChatBody, tools: ToolUse | None, deadline: float | None) -> Grammar | None:
    """What the text must be: calls where a tool is required, else what the caller constrains it to."""
    wanted = await grammar_of(request, body, deadline)
    if tools is None or tools.grammar is None:
        return wanted
    if wanted is not None:
        message = "a required tool call and a constrained text exclude each other"
        raise InvalidRequest(message, param="tool_choice")
    return await checked_grammar(request, Grammar("lark", tools.grammar), param="tools", deadline=deadline)


@dataclass(slots=True)
class _ChoiceState:
    """One choice's answer in the making."""

    parser: ToolCallParser | None
    begun: bool = False
    content: str = ""
    calls: list[AnswerToolCall] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str = ""

    def read(self, delta: Delta) -> Reading:
        if self.parser is None:
            return Reading(delta.text)
        reading = self.parser.feed(delta.text)
        if delta.finish_reason is not None:
            reading.add(self.parser.finish())
        return reading

    def finish(self, reason: str) -> str:
        """OpenAI's reason: a reply that stopped after calling tools waits for their results."""
        called = self.parser is not None and self.parser.num_calls > 0
        return "tool_calls" if called and reason == "stop" else reason


class ChatWriter:
    def __init__(self, body: ChatBody, generation: Generation, tools: ToolUse | None) -> None:
        model = generation.model
        self._body = body
        self._tokenizer = model.tokenizer
        self._head: dict[str, object] = {
            "id": new_id("chatcmpl"),
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model.name,
            "system_fingerprint": model.version,
        }
        self._encoder = ChunkEncoder(self._head, include_usage=body.include_usage)
        self._choices = [_ChoiceState(_parser(tools)) for _ in generation.choices]

    def chunk(self, delta: Delta) -> bytes:
        """OpenAI's order: the role alone, then content and calls, then the reason alone."""
        choice, index = self._choices[delta.index], delta.index
        chunks: list[ChatChunk] = []
        if not choice.begun:
            choice.begun = True
            chunks.append(ChatChunk(index, ChatDelta(role="assistant", content="")))
        reading = choice.read(delta)
        logprobs = self._logprobs(delta.tokens)
        if reading.content or logprobs is not None:
            built = None if logprobs is None else logprobs.model_dump()
            chunks.append(ChatChunk(index, ChatDelta(content=reading.content), logprobs=built))
        chunks += [ChatChunk(index, ChatDelta(tool_calls=[_call_chunk(piece)])) for piece in reading.calls]
        if delta.finish_reason is not None:
            chunks.append(ChatChunk(index, ChatDelta(), finish_reason=choice.finish(delta.finish_reason)))
        return b"".join([self._encoder.choice(chunk) for chunk in chunks])

    def end(self, usage: UsageAnswer) -> bytes:
        return (self._encoder.usage(usage) if self._body.include_usage else b"") + DONE

    def add(self, delta: Delta) -> None:
        choice = self._choices[delta.index]
        reading = choice.read(delta)
        choice.content += reading.content
        choice.logprobs += delta.tokens
        for piece in reading.calls:
            if piece.id is not None:
                function = AnswerFunction(name=piece.name or "", arguments="")
                choice.calls.append(AnswerToolCall(id=piece.id, function=function))
            choice.calls[piece.index].function.arguments += piece.arguments
        if delta.finish_reason is not None:
            choice.finish_reason = choice.finish(delta.finish_reason)

    def answer(self, usage: UsageAnswer) -> ChatAnswer:
        choices = [
            ChatChoice(
                index=index,
                message=AnswerMessage(
                    content=None if choice.calls and not choice.content else choice.content,
                    tool_calls=choice.calls or None,
                ),
                logprobs=self._logprobs(choice.logprobs, always=True),
                finish_reason=choice.finish_reason,
            )
            for index, choice in enumerate(self._choices)
        ]
        head = {**self._head, "object": "chat.completion"}
        return ChatAnswer.model_validate({**head, "choices": choices, "usage": usage})

    def _logprobs(self, tokens: Sequence[TokenLogprobs], *, always: bool = False) -> ChatLogprobs | None:
        if not self._body.logprobs or not (tokens or always):
            return None
        return ChatLogprobs(content=chat_logprobs(self._tokenizer, tokens))


def _parser(tools: ToolUse | None) -> ToolCallParser | None:
    return None if tools is None else ToolCallParser(tools.format, max_calls=tools.max_calls)


def _call_chunk(piece: CallPiece) -> CallChunk:
    function = CallFunctionChunk(name=piece.name, arguments=piece.arguments)
    begins = piece.id is not None
    return CallChunk(piece.index, id=piece.id, type="function" if begins else None, function=function)
