"""What `helm test` runs: the service is ready, tells its metrics, and answers a real request to each of its models.

SMOKE_URL, and SMOKE_API_KEY where keys are asked for; without a key it must see that a request without one is refused.
Only the standard library. Runs in a pod of its own, in the service's image.
"""

import json
import os
import re
import ssl
import sys
import urllib.error
import urllib.request
from typing import Any

URL = os.environ["SMOKE_URL"].rstrip("/")
KEY = os.environ.get("SMOKE_API_KEY", "").strip()
# In a cluster the certificate is made out to the public name, not to the Service's.
UNVERIFIED = ssl._create_unverified_context()
SERIES = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*(\{.*\})? [^ ]+")
REQUESTS = {
    "generate": ("/v1/completions", {"prompt": "Once upon a time", "max_tokens": 4}),
    "embed": ("/v1/embeddings", {"input": ["Once upon a time"]}),
    "classify": ("/v1/classify", {"input": ["Once upon a time"]}),
}


def ask(path: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {KEY}"} if KEY else {})
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(URL + path, data=data, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60, context=UNVERIFIED) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def check(what: str, ok: bool, detail: str = "") -> None:
    print(f"{'ok' if ok else 'FAILED'}: {what} {'' if ok else detail[:500]}".rstrip(), flush=True)
    if not ok:
        sys.exit(1)


def main() -> None:
    status, text = ask("/readyz")
    check("ready", status == 200, text)
    status, text = ask("/metrics")
    if status != 401 or KEY:
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        check("metrics", status == 200 and "slimpajama_worker_up 1.0" in lines, text)
        wrong = [line for line in lines if not SERIES.fullmatch(line)]
        check("metrics can be read", not wrong, "\n".join(wrong))
    status, text = ask("/v1/models")
    if status == 401 and not KEY:
        check("keys are asked for", True)
        return
    check("models", status == 200, text)
    for card in json.loads(text)["data"]:
        task = next((task for task in REQUESTS if task in card["tasks"]), None)
        path, body = REQUESTS[task] if task else ("/v1/tokenize", {"text": "Once upon a time"})
        status, text = ask(path, {"model": card["id"], **body})
        check(f"{card['id']}: {path}", status == 200, text)


if __name__ == "__main__":
    main()
