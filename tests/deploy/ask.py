"""Asks a service that runs in a container, for `image.sh`; only the standard library, as nothing is installed there.

- `ask.py URL ready`: waits until it is ready.
- `ask.py URL tasks`: one request for each task; `count`: how many these are.
- `ask.py URL held COUNT COMMAND...`: runs a command with COUNT accepted requests in hand, half of them streams;
  all of them must be answered to their last token.
"""

import json
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from typing import Any

STORY = "Tom had a red ball. He played with it in the park every day. One day the ball rolled into the pond."
LM, ENCODER = "slimpajama-tiny-lm", "slimpajama-tiny-encoder"
LONG = 200

TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "completion": ("completions", {"model": LM, "prompt": "Once upon a time", "max_tokens": 8}),
    "chat": ("chat/completions", {"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 8}),
    "embeddings": ("embeddings", {"model": ENCODER, "input": ["a", "b"]}),
    "similarity": ("similarity", {"source": "a cat", "targets": ["a kitten", "a bank"]}),
    "rerank": ("rerank", {"query": "pets", "documents": ["a kitten", "a bank"]}),
    "classification": ("classify", {"input": ["The team won."], "labels": ["sport", "politics"]}),
    "sentiment": ("sentiment", {"input": ["A joy from beginning to end."]}),
    "summary": ("summarize", {"input": STORY}),
    "translation": ("translate", {"input": "the dog", "target": "fr"}),
    "answer": ("answer", {"question": "What did Tom have?", "context": STORY}),
    "tokens": ("tokenize", {"text": "Once upon a time"}),
}


def post(url: str, path: str, body: dict[str, Any]) -> str:
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"{url}/v1/{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        return answer.read().decode()


def accepted(url: str) -> float:
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    return sum(float(value) for value in re.findall(r"(?m)^slimpajama_requests_accepted_total\S* (\S+)$", text))


def ready(url: str) -> None:
    while True:
        try:
            urllib.request.urlopen(f"{url}/readyz", timeout=5).close()
            return
        except OSError:
            time.sleep(0.05)


def tasks(url: str) -> None:
    for name, (path, body) in TASKS.items():
        try:
            text = post(url, path, body)
        except urllib.error.HTTPError as error:
            raise SystemExit(f"{name}: {error.code} {error.read().decode()}") from None
        sys.stdout.write(f"{name}: {' '.join(text.split())[:120]}\n")


def num_tokens(url: str, number: int) -> int:
    """Of one long completion, streamed or not."""
    body = {"model": LM, "prompt": "Once", "max_tokens": LONG, "ignore_eos": True, "seed": number, "temperature": 1}
    if number % 2 == 0:
        return int(json.loads(post(url, "completions", body))["usage"]["completion_tokens"])
    text = post(url, "completions", body | {"stream": True, "stream_options": {"include_usage": True}})
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return int(json.loads(events[-2])["usage"]["completion_tokens"]) if events[-1] == "[DONE]" else 0


def held(url: str, count: int, command: list[str]) -> None:
    answered: list[int | str] = []

    def call(number: int) -> None:
        try:
            answered.append(num_tokens(url, number))
        except (OSError, ValueError, LookupError) as error:
            answered.append(repr(error))

    before = accepted(url)
    callers = [threading.Thread(target=call, args=(number,)) for number in range(count)]
    for caller in callers:
        caller.start()
    while accepted(url) < before + count and not answered:
        time.sleep(0.01)
    finished = len(answered)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    for caller in callers:
        caller.join()
    if answered != [LONG] * count:
        raise SystemExit(f"requests were lost: {answered}")
    if finished:
        raise SystemExit(f"{finished} of {count} were answered before the command: it shows nothing")
    sys.stdout.write(f"{count} requests of {LONG} tokens in hand, all answered whole\n")


if __name__ == "__main__":
    url, what, *rest = sys.argv[1:]
    if what == "held":
        held(url, int(rest[0]), rest[1:])
    elif what == "count":
        sys.stdout.write(f"{len(TASKS)}\n")
    else:
        {"ready": ready, "tasks": tasks}[what](url)
