"""`LLM`: the engine for scripts. Blocking, and thin: the same engine thread as `AsyncLLM` does the work."""

from __future__ import annotations

import dataclasses
import itertools
import queue
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from kvarn.config import CacheConfig, EngineConfig, GrammarConfig, SchedulerConfig
from kvarn.engine.beam import BeamParams, beam_text, new_search
from kvarn.engine.events import Event, RequestFailed, merge_outputs
from kvarn.engine.front import EngineFront
from kvarn.engine.load import LoadedEngine, load_engine
from kvarn.errors import ConfigError, RequestError
from kvarn.request import FinishReason, Request, RequestOutput, SamplingParams, TokenLogprob

Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer, whole."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """The `n` answers to one prompt. `text`, `token_ids` and `finish_reason` are the first one's."""

    prompt_token_ids: tuple[int, ...]
    choices: tuple[Choice, ...]
    num_cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """Of the prompt's tokens from the second on, where they were asked for."""

    @property
    def text(self) -> str:
        """Text of the first answer."""
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Tokens of the first answer."""
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        """Why the first answer ended."""
        return self.choices[0].finish_reason


class LLM(EngineFront):
    """A loaded model. A context manager; close it when done.

    with LLM("smollm2-135m-instruct", max_num_seqs=16) as llm:
        print(llm.chat([{"role": "user", "content": "Name three rivers."}]).text)

    Settings are an `EngineConfig`, or its fields by name, those of its `cache`, `scheduler` and `grammar` among them.
    Methods may be called from several threads; Ctrl-C in one of them aborts what it waits for and leaves the engine as
    it was.
    """

    def __init__(self, name_or_path: str, *, config: EngineConfig | None = None, **overrides: Any) -> None:
        """Loads a catalogued name, a .gguf file or a folder.

        Raises ModelFileError, UnsupportedModelError, PullError, CapacityError, and ConfigError for a wrong setting.
        """
        self._start(load_engine(name_or_path, with_overrides(config or EngineConfig(), overrides)))

    @classmethod
    def from_engine(cls, engine: LoadedEngine) -> Self:
        """A front for an engine that is loaded already; owned from now on."""
        llm = cls.__new__(cls)
        llm._start(engine)
        return llm

    def _start(self, engine: LoadedEngine) -> None:
        super().__init__(engine)
        self._numbers = itertools.count()

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Completes one text, or each of several texts or lists of token ids; in the order of the prompts.

        All run together, as many as the engine takes. sampling: for all, or one for each. Raises RequestError before
        anything runs where one of the prompts is wrong, EngineError where the engine fails, or one of them does.
        """
        several = [prompts] if isinstance(prompts, str) else list(prompts)
        params = [sampling or SamplingParams()] * len(several) if not isinstance(sampling, Sequence) else list(sampling)
        if len(params) != len(several):
            raise RequestError(f"{len(params)} sampling params for {len(several)} prompts", field="sampling")
        requests = [self._request(p, s) for p, s in zip(several, params, strict=True)]
        gathered: dict[str, list[RequestOutput]] = {request.request_id: [] for request in requests}
        for output in self._run(requests):
            gathered[output.request_id].append(output)
        return [_completion(request, gathered[request.request_id]) for request in requests]

    def chat(
        self, messages: Sequence[Mapping[str, Any]], sampling: SamplingParams | None = None, **template: Any
    ) -> Completion:
        """The answer to a conversation. template: keywords of `Tokenizer.encode_chat` (tools, …)."""
        (completion,) = self.generate([self.tokenizer.encode_chat(messages, **template)], sampling)
        return completion

    def stream(self, prompt: Prompt, sampling: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Completes one prompt piece by piece.

        The request is checked at once, starts with the first read, and is aborted where the iterator is closed early.
        """
        request = self._request(prompt, sampling or SamplingParams())
        return self._run([request])

    def beam_search(self, prompt: Prompt, params: BeamParams, sampling: SamplingParams) -> list[Choice]:
        """The `sampling.n` best continuations of at most `max_tokens` tokens, the best first. No token is drawn.

        Raises RequestError, also for parameters that do not go with it, and EngineError.
        """
        request = self._request(prompt, sampling)
        ids = request.prompt_token_ids
        search = new_search(sampling, params, len(ids), self.tokenizer.eos_token_ids)
        while search.open:
            answers = self.generate([ids + beam.token_ids for beam in search.open], params.extension)
            search.take([answer.choices[0].logprobs[0].top for answer in answers])
        best = enumerate(search.best(sampling.n))
        return [Choice(i, beam_text(self.tokenizer, ids, beam, sampling), beam.token_ids, beam.end) for i, beam in best]

    def close(self) -> None:
        """Ends the engine and releases its memory. Idempotent."""
        self._closer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _request(self, prompt: Prompt, sampling: SamplingParams) -> Request:
        """Checked: it can run."""
        if isinstance(prompt, int):
            raise RequestError("prompts are texts or lists of token ids; put a single list into a list", field="prompt")
        ids = self.tokenizer.encode(prompt, add_special_tokens=True) if isinstance(prompt, str) else prompt
        request = Request(f"llm-{next(self._numbers)}", tuple(ids), sampling)
        request = self._loop.resolve(request)
        self._loop.check(request)
        return request

    def _run(self, requests: Iterable[Request]) -> Iterator[RequestOutput]:
        """Outputs of all requests as they come. No more are submitted at a time than the engine's queue takes."""
        waiting, inbox, unfinished = deque(requests), _Inbox(), dict[str, int]()
        try:
            while waiting or unfinished:
                while waiting and self._fits(waiting[0], unfinished):
                    request = waiting.popleft()
                    unfinished[request.request_id] = len(request.prompt_token_ids)
                    self._loop.submit(request, inbox)
                for event in inbox.get():
                    if isinstance(event, RequestFailed):
                        unfinished.pop(event.request_id, None)
                        raise event.error
                    if event.finished:
                        unfinished.pop(event.request_id, None)
                    yield event
        finally:
            for request_id in unfinished:
                self._loop.abort(request_id)


    def _fits(self, request: Request, unfinished: Mapping[str, int]) -> bool:
        """Whether the queue takes one more, were all unfinished ones in it."""
        scheduler = self.config.scheduler
        tokens = sum(unfinished.values()) + len(request.prompt_token_ids)
        within = scheduler.max_num_queued_tokens is None or tokens <= scheduler.max_num_queued_tokens
        return not unfinished or (within and len(unfinished) < scheduler.max_num_queued_requests)


class _Inbox:
    """A receiver that a blocking reader waits on."""

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()

    def receive(self, events: Sequence[tuple[object, Event]]) -> None:
        """Called in the engine's thread."""
        self._events.put([event for _, event in events])

    def get(self) -> list[Event]:
        """The events of the next step that has any."""
        return self._events.get()


def _completion(request: Request, outputs: Sequence[RequestOutput]) -> Completion:
    whole = merge_outputs(outputs)
    choices = tuple(
        Choice(part.index, part.text, part.token_ids, part.finish_reason, part.stop_reason, part.logprobs)
        for part in whole.outputs
        if part.finish_reason is not None
    )
    return Completion(request.prompt_token_ids, choices, whole.num_cached_tokens, whole.prompt_logprobs)


def with_overrides(config: EngineConfig, overrides: Mapping[str, Any]) -> EngineConfig:
    """The config with fields changed by name, wherever in it they are. Raises ConfigError for a name it lacks.

    The cache's type goes by `kv_cache_dtype`, as on the command line.
    """
    places: dict[str, dict[str, Any]] = {"": {}, "cache": {}, "scheduler": {}, "grammar": {}}
    nested = {
        place: {field.name for field in dataclasses.fields(record)}
        for place, record in (("cache", CacheConfig), ("scheduler", SchedulerConfig), ("grammar", GrammarConfig))
    }
    own = {field.name for field in dataclasses.fields(EngineConfig)}
    for name, value in overrides.items():
        field = "dtype" if name == "kv_cache_dtype" else name
        owners = [place for place, names in nested.items() if field in names]
        if name in own:
            places[""][name] = value
        elif owners and name != "dtype":
            places[owners[0]][field] = value
        else:
            raise ConfigError(f"there is no setting {name!r}")
    parts = {place: dataclasses.replace(getattr(config, place), **places[place]) for place in nested if places[place]}
    return dataclasses.replace(config, **parts, **places[""])
