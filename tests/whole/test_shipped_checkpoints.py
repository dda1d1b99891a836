"""`make serve` with no arguments: the checkpoints that ship with the project answer at every endpoint of the README."""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from shipped_adapter import write_shipped_adapter

from model.training.rest import held_out_rows
from tests.readme.tables import README, section
from tests.whole.conftest import ROOT, start

Client = httpx.Client
LM, ENCODER = "slimpajama-tiny-lm", "slimpajama-tiny-encoder"
STORY = "Tom had a red ball. He played with it in the park. One day a dog took the ball and ran away."
BRIDGE = "The bridge was built by Maria Keller in 1887. It crosses the river Elbe and is 320 metres long."
GOOD, BAD = "A wonderful, touching film.", "Two hours of boredom, a waste of time."
CLOSE, FAR = "A cheerful woman.", "The stock market fell."
NAMES = "Then Elizabeth went to London with her sister."
CARD = "When will my new card arrive?"


def command(*arguments: str) -> list[str]:
    """What `make serve ARGS=...` runs, by the Makefile itself, under this Python."""
    # Also where the tests are themselves run by make, which hands its flags and its level down.
    around = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    made = subprocess.run(
        ["make", "--dry-run", "serve", f"ARGS={' '.join(arguments)}"],
        cwd=ROOT, env=around, capture_output=True, text=True,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    program, *rest = made.stdout.strip().splitlines()[-1].split()
    assert program.endswith("/slimpajama")
    return [sys.executable, "-m", "service", *rest]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    keys = tmp_path_factory.mktemp("keys") / "admin"
    keys.write_text("walker:a-key-for-the-walk")
    process = start(command("--port", "0", "--log-format", "json", "--admin-keys-file", str(keys)))
    assert process.stdout is not None
    line = ""
    while "listening" not in line:
        line = process.stdout.readline()
        assert process.poll() is None, line
    url = f"http://127.0.0.1:{json.loads(line)['port']}"
    with httpx.Client(base_url=url, timeout=120, headers={"Authorization": "Bearer a-key-for-the-walk"}) as client:
        while client.get("/readyz").status_code != 200:
            assert process.poll() is None
        yield client
    process.terminate()
    process.communicate(timeout=60)


def get(client: Client, path: str) -> Any:
    response = client.get(path)
    assert response.status_code == 200, response.text
    return response.json() if "json" in response.headers["content-type"] else response.text


def post(client: Client, path: str, **body: Any) -> Any:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def unit(vector: list[float]) -> bool:
    return len(vector) == 384 and abs(sum(value * value for value in vector) - 1) < 0.01


def labels(scored: list[dict[str, Any]]) -> list[str]:
    """The labels of rows of {label, score}, which must be shares, best first."""
    shares = [row["score"] for row in scored]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1, abs=0.02)
    return [row["label"] for row in scored]


PROBES = ("/livez", "/startupz", "/health", "/readyz", "/ping", "/", "/version")


def probes(client: Client) -> None:
    assert all(get(client, path) for path in PROBES)


def models(client: Client) -> None:
    assert {row["id"]: row["state"] for row in get(client, "/v1/models")["data"]} == {LM: "ready", ENCODER: "ready"}


def one_model(client: Client) -> None:
    found = get(client, f"/v1/models/{ENCODER}")
    assert found == get(client, f"/v1/models/{ENCODER}@{found['version']}")


def metrics(client: Client) -> None:
    assert 'slimpajama_model_info{architecture="LlamaForCausalLM",device="cpu"' in get(client, "/metrics")


def completions(client: Client) -> None:
    found = post(client, "/v1/completions", prompt="Once upon a time", max_tokens=40, temperature=0)
    words = re.findall(r"[A-Za-z]+", found["choices"][0]["text"])
    assert found["model"] == LM
    assert len(words) > 15
    assert len({"a", "the", "was", "and", "to"} & set(words)) >= 3  # English


def chat(client: Client) -> None:
    asked = {"Hello": "small language model", f"Is this positive or negative?\n\n{GOOD}": "positive"}
    for content, wanted in asked.items():
        messages = [{"role": "user", "content": content}]
        found = post(client, "/v1/chat/completions", messages=messages, temperature=0)["choices"][0]
        assert wanted in found["message"]["content"]
        assert found["finish_reason"] == "stop"


def responses(client: Client) -> None:
    found = post(client, "/v1/responses", input="Who are you?", temperature=0)
    assert found["status"] == "completed"
    assert "small language model" in found["output"][0]["content"][0]["text"]


def messages(client: Client) -> None:
    asked = [{"role": "user", "content": "Who are you?"}]
    found = post(client, "/v1/messages", model=LM, max_tokens=120, messages=asked, temperature=0)
    assert (found["type"], found["stop_reason"]) == ("message", "end_turn")
    assert "small language model" in found["content"][0]["text"]
    counted = post(client, "/v1/messages/count_tokens", model=LM, messages=asked)["input_tokens"]
    assert counted == found["usage"]["input_tokens"] + found["usage"]["cache_read_input_tokens"]


def tokens(client: Client) -> None:
    for model in (LM, ENCODER):
        ids = post(client, "/v1/tokenize", model=model, text="the red ball")["tokens"]
        text = post(client, "/v1/detokenize", model=model, tokens=ids, skip_special_tokens=True)["text"]
        assert text == "the red ball"


def embeddings(client: Client) -> None:
    rows = post(client, "/v1/embeddings", input=[CLOSE, FAR])["data"]
    assert [unit(row["embedding"]) for row in rows] == [True, True]


def similarity(client: Client) -> None:
    found = post(client, "/v1/similarity", source="A happy person.", targets=[FAR, CLOSE])
    far, close = (row["score"] for row in found["data"])
    assert far < 0.2 < 0.5 < close


def rerank(client: Client) -> None:
    found = post(client, "/v1/rerank", query="Who is glad?", documents=[FAR, CLOSE])
    assert [row["index"] for row in found["results"]] == [1, 0]


def relevance(client: Client) -> None:
    rows = post(client, "/v2/rerank", query="Who is glad?", documents=[FAR, CLOSE])["results"]
    assert [row["index"] for row in rows] == [1, 0]
    assert 0 < rows[1]["relevance_score"] < rows[0]["relevance_score"] < 1


def cohere_embed(client: Client) -> None:
    assert [unit(row) for row in post(client, "/v1/embed", texts=[CLOSE, FAR])["embeddings"]] == [True, True]
    rows = post(client, "/v2/embed", texts=["A happy person.", CLOSE, FAR], embedding_types=["int8", "binary"])
    happy, close, far = (np.array(row, dtype=float) for row in rows["embeddings"]["int8"])
    assert happy @ far / np.linalg.norm(far) < 0.5 * (happy @ close) / np.linalg.norm(close)
    assert {len(row) for row in rows["embeddings"]["binary"]} == {384 // 8}


def score(client: Client) -> None:
    for path in ("/v1/score", "/score"):
        far, close = (row["score"] for row in post(client, path, text_1="A happy person.", text_2=[FAR, CLOSE])["data"])
        assert far < 0.2 < 0.5 < close


def roots(client: Client) -> None:
    assert post(client, "/embeddings", input=CLOSE) == post(client, "/v1/embeddings", input=CLOSE)
    assert get(client, "/models") == get(client, "/v1/models")
    (row,) = post(client, "/classify?head=sentiment", input=GOOD)["data"]
    assert (row["label"], row["num_classes"]) == ("positive", 2)
    for path in ("/", "/invocations"):
        assert [unit(row) for row in post(client, path, inputs=[CLOSE, FAR])] == [True, True]


def tei_embed(client: Client) -> None:
    assert [unit(row) for row in post(client, "/embed", inputs=[CLOSE, FAR])] == [True, True]


def tei_embed_all(client: Client) -> None:
    (rows,) = post(client, "/embed_all", inputs="red ball")
    assert [len(row) for row in rows] == [384] * 4  # [CLS] red ball [SEP]


def sparse(client: Client) -> None:
    """Neither checkpoint is a sparse encoder: each says what it can do instead."""
    named = client.post("/v1/sparse_embeddings", json={"input": "red ball", "model": ENCODER})
    assert "cannot do 'embed_sparse', it can do: embed" in named.json()["error"]["message"]
    in_address = client.post(f"/embed_sparse?model={LM}", json={"inputs": "red ball"})
    assert [named.status_code, in_address.status_code] == [400, 400]


def tei_predict(client: Client) -> None:
    assert labels(post(client, "/predict?head=sentiment", inputs=GOOD)) == ["positive", "negative"]


def tei_rerank(client: Client) -> None:
    assert [row["index"] for row in post(client, "/rerank", query="Who is glad?", texts=[FAR, CLOSE])] == [1, 0]


def tei_similarity(client: Client) -> None:
    far, close = post(client, "/similarity", inputs={"source_sentence": "A happy person.", "sentences": [FAR, CLOSE]})
    assert far < 0.2 < 0.5 < close


def tei_tokens(client: Client) -> None:
    assert post(client, "/detokenize", tokens=post(client, "/tokenize", prompt="a")["tokens"])["prompt"]
    (rows,) = post(client, "/tokenize", inputs="red ball")
    assert [(row["text"], row["start"], row["stop"]) for row in rows[1:-1]] == [("red", 0, 3), ("ball", 4, 8)]
    assert post(client, "/decode", ids=[row["id"] for row in rows]) == ["red ball"]


def tei_info(client: Client) -> None:
    found = get(client, "/info")
    assert (found["model_id"], list(found["model_type"])) == (ENCODER, ["embedding"])


def text_generation(client: Client) -> None:
    """The same text by all three addresses as by ours, whole and as a stream."""
    wanted = post(client, "/v1/completions", prompt="Once upon a time", max_tokens=12, temperature=0)["choices"][0]
    asked = {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 12}}
    for path in ("/generate", "/hf/text-generation"):
        assert post(client, path, **asked)["generated_text"] == wanted["text"]
    lines = client.post("/generate_stream", json=asked).text.split("\n\n")[:-1]
    events = [json.loads(line.removeprefix("data:")) for line in lines]
    assert "".join(event["token"]["text"] for event in events) == events[-1]["generated_text"] == wanted["text"]


def hf_text_classification(client: Client) -> None:
    (row,) = post(client, "/hf/text-classification?head=sentiment", inputs=BAD)
    assert labels(row) == ["negative", "positive"]


def hf_zero_shot(client: Client) -> None:
    parameters = {"candidate_labels": ["politics", "sport"]}
    found = post(client, "/hf/zero-shot-classification", inputs="The team won the match.", parameters=parameters)
    assert labels(found) == ["sport", "politics"]


def hf_features(client: Client) -> None:
    (row,) = post(client, "/hf/feature-extraction", inputs=[CLOSE])
    assert unit(row)


def hf_similarity(client: Client) -> None:
    inputs = {"source_sentence": "A happy person.", "sentences": [FAR, CLOSE]}
    far, close = post(client, "/hf/sentence-similarity", inputs=inputs)
    assert far < 0.2 < 0.5 < close


def hf_summarization(client: Client) -> None:
    (found,) = post(client, "/hf/summarization", inputs=STORY)
    assert found["summary_text"]


def hf_translation(client: Client) -> None:
    (found,) = post(client, "/hf/translation", inputs="the dog", parameters={"src_lang": "en", "tgt_lang": "fr"})
    assert found["translation_text"]


def hf_answers(client: Client) -> None:
    found = post(client, "/hf/question-answering", inputs={"question": "Who built the bridge?", "context": BRIDGE})
    assert found["answer"] == "Maria Keller" == BRIDGE[found["start"] : found["end"]]


def classify(client: Client) -> None:
    asked: list[dict[str, Any]] = [
        {"input": CARD, "head": "intents"},
        {"input": "WINNER!! Call 09061701461 to claim £900", "head": "spam"},
        {"input": "The team won the match.", "labels": ["politics", "sport"]},
    ]
    found = [post(client, "/v1/classify", **body) for body in asked]
    assert [answer["data"][0]["label"] for answer in found] == ["card_arrival", "spam", "sport"]
    assert {answer["model"] for answer in found} == {ENCODER}


def sentiment(client: Client) -> None:
    found = post(client, "/v1/sentiment", input=[GOOD, BAD])
    assert [row["label"] for row in found["data"]] == ["positive", "negative"]


def summarize(client: Client) -> None:
    found = post(client, "/v1/summarize", input=STORY, max_sentences=1)
    assert found["data"][0]["summary"].rstrip(".") in STORY
    written = post(client, "/v1/summarize", input=STORY, model=LM, temperature=0)
    assert re.search("Tom|ball|dog", written["data"][0]["summary"])


def translate(client: Client) -> None:
    """The language model knows English alone: an answer in the right form is all there is."""
    assert post(client, "/v1/translate", input="the dog", source="en", target="fr")["data"][0]["translation"]


def answer(client: Client) -> None:
    asked = {"When was the bridge built?": "1887", "How long is the bridge?": "320 metres"}
    for question, wanted in asked.items():
        found = post(client, "/v1/answer", question=question, context=BRIDGE)["data"][0]
        assert found["answer"].rstrip(".") == wanted
        assert BRIDGE[found["start"] : found["end"]] == found["answer"]


def tags(client: Client) -> None:
    """Names, which the uncased encoder finds without their capitals."""
    for text in (NAMES, NAMES.lower()):
        found = post(client, "/v1/tag", input=text)["data"][0]["parts"]
        assert [(part["label"], part["text"]) for part in found] == [
            ("NAME", text[5:14]), ("NAME", text[23:29])
        ]  # fmt: skip
        assert [(part["start"], part["end"]) for part in found] == [(5, 14), (23, 29)]
    rows = post(client, "/hf/token-classification", inputs=NAMES)
    assert [(row["entity"], row["word"]) for row in rows] == [("NAME", "elizabeth"), ("NAME", "london")]
    assert "token_classify" in get(client, f"/v1/models/{ENCODER}")["tasks"]


def admin(client: Client) -> None:
    """A second encoder comes, changes, goes back and leaves."""
    source = str(ROOT / "checkpoints" / ENCODER)
    for version in ("one", "two"):
        post(client, "/admin/models/spare", source=source, version=version, keep_former=True)
    shared = client.put("/admin/models/spare/alias", json={"weights": {"one": 1, "two": 3}}).json()
    assert {row["version"]: row["weight"] for row in shared["versions"]} == {"one": 0.25, "two": 0.75}
    back = client.post("/admin/models/spare/rollback").json()
    assert {row["version"]: row["weight"] for row in back["versions"] if row["weight"]} == {"two": 1.0}
    assert {row["name"] for row in get(client, "/admin/models")["data"]} == {LM, ENCODER, "spare"}
    assert client.delete("/admin/models/spare").status_code == 204
    assert {row["name"] for row in get(client, "/admin/models")["data"]} == {LM, ENCODER}


def adapters(client: Client) -> None:
    """An adapter of the language model comes, is asked beside it, and leaves."""
    with tempfile.TemporaryDirectory() as root:
        folder = write_shipped_adapter(Path(root))[0]
        settings = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": LM}
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        loaded = client.post("/v1/load_lora_adapter", json={"lora_name": "tuned", "lora_path": str(folder)})
        assert loaded.text == "Success: LoRA adapter 'tuned' added successfully."
    assert get(client, "/v1/models/tuned")["parent"] == LM
    texts = [
        post(client, "/v1/completions", model=model, prompt=STORY, max_tokens=20, temperature=0)["choices"][0]["text"]
        for model in (LM, "tuned")
    ]
    assert texts[0] != texts[1]
    left = client.post("/v1/unload_lora_adapter", json={"lora_name": "tuned"})
    assert left.text == "Success: LoRA adapter 'tuned' removed successfully."
    while {row["name"] for row in get(client, "/admin/models")["data"]} != {LM, ENCODER}:
        time.sleep(0.02)


WALK: dict[str, Callable[[Client], None]] = {
    **{f"GET {path}": probes for path in PROBES},
    "GET /v1/models": models,
    "GET /v1/models/{name}": one_model,
    "GET /metrics": metrics,
    "POST /v1/completions": completions,
    "POST /v1/chat/completions": chat,
    "POST /v1/responses": responses,
    "POST /v1/messages": messages,
    "POST /v1/messages/count_tokens": messages,
    "POST /v1/tokenize": tokens,
    "POST /v1/detokenize": tokens,
    "POST /v1/embeddings": embeddings,
    "POST /v1/sparse_embeddings": sparse,
    "POST /v1/similarity": similarity,
    "POST /v1/rerank": rerank,
    "POST /v2/rerank": relevance,
    "POST /v1/embed": cohere_embed,
    "POST /v2/embed": cohere_embed,
    "POST /v1/score": score,
    "POST /score": score,
    "POST /embeddings": roots,
    "GET /models": roots,
    "POST /classify": roots,
    "POST /": roots,
    "POST /invocations": roots,
    "POST /detokenize": tei_tokens,
    "POST /embed": tei_embed,
    "POST /embed_all": tei_embed_all,
    "POST /embed_sparse": sparse,
    "POST /predict": tei_predict,
    "POST /rerank": tei_rerank,
    "POST /similarity": tei_similarity,
    "POST /tokenize": tei_tokens,
    "POST /decode": tei_tokens,
    "GET /info": tei_info,
    "POST /generate": text_generation,
    "POST /generate_stream": text_generation,
    "POST /hf/text-generation": text_generation,
    "POST /hf/text-classification": hf_text_classification,
    "POST /hf/zero-shot-classification": hf_zero_shot,
    "POST /hf/feature-extraction": hf_features,
    "POST /hf/sentence-similarity": hf_similarity,
    "POST /hf/summarization": hf_summarization,
    "POST /hf/translation": hf_translation,
    "POST /hf/question-answering": hf_answers,
    "POST /v1/classify": classify,
    "POST /v1/sentiment": sentiment,
    "POST /v1/tag": tags,
    "POST /hf/token-classification": tags,
    "POST /v1/summarize": summarize,
    "POST /v1/translate": translate,
    "POST /v1/answer": answer,
    "GET /admin/models": admin,
    "POST /admin/models/{name}/rollback": admin,
    "PUT /admin/models/{name}/alias": admin,
    "POST /admin/models/{name}": admin,
    "DELETE /admin/models/{name}": admin,
    "POST /v1/load_lora_adapter": adapters,
    "POST /v1/unload_lora_adapter": adapters,
}


def endpoints_of_the_readme() -> list[str]:
    text = README.read_text()
    first, last = section(text, "endpoints")
    return re.findall(r"^\| `(.+?)` \|", text[first:last], re.MULTILINE)


def test_the_walk_leaves_no_endpoint_of_the_readme_out() -> None:
    assert sorted(WALK) == sorted(endpoints_of_the_readme())


@pytest.mark.parametrize("visit", dict.fromkeys(WALK.values()), ids=lambda visit: visit.__name__)
def test_the_shipped_checkpoints_answer_sensibly_at(visit: Callable[[Client], None], client: Client) -> None:
    visit(client)


OF_HEAD = ("/classify", "/predict", "/hf/text-classification")
"""They name no labels, and the encoder has several heads."""
OF_SPARSE_ENCODERS = ("/v1/sparse_embeddings", "/embed_sparse")
"""Neither checkpoint is one."""


def test_every_example_of_the_description_is_answered(client: Client) -> None:
    failed = []
    for path, operations in get(client, "/openapi.json")["paths"].items():
        if "requestBody" in operations.get("post", {}) and not path.startswith("/admin") and "lora" not in path:
            example = operations["post"]["requestBody"]["content"]["application/json"]["example"]
            address = f"{path}?head=sentiment" if path in OF_HEAD else path
            expected = 404 if path in OF_SPARSE_ENCODERS else 200
            if (response := client.post(address, json=example)).status_code != expected:
                failed.append((path, response.text))
    assert failed == []


@pytest.mark.parametrize("name", [LM, ENCODER])
def test_card_evaluation_and_service_agree_on_what_the_checkpoint_is(name: str, client: Client) -> None:
    folder: Path = ROOT / "checkpoints" / name
    card, sizes = (folder / "README.md").read_text(), json.loads((folder / "evaluation.json").read_text())["sizes"]
    (served,) = (row for row in get(client, "/v1/models")["data"] if row["id"] == name)
    assert f"# {name}\n" in card
    assert f"(`{served['architecture']}`)" in card
    assert f"{sizes['parameters']:,} parameters" in card
    assert re.search(rf"context\s+{served['context_length']}\.|at most {served['context_length']} tokens", card)
    assert sizes.get("context", served["context_length"]) == served["context_length"]
    config = json.loads((folder / "config.json").read_text())
    assert (config["vocab_size"], config["num_hidden_layers"]) == (sizes["vocabulary"], sizes["layers"])
    assert (config["hidden_size"], config["intermediate_size"]) == (sizes["hidden"], sizes["intermediate"])


def test_the_service_judges_held_out_sentences_as_well_as_the_evaluation_says(client: Client) -> None:
    data = ROOT.parent / "shared/data"
    if not data.is_dir():
        pytest.skip("the data sets are not in ../shared/data")
    rows = held_out_rows(data)["sentiment"]
    hits = 0
    for first in range(0, len(rows), 100):
        part = rows[first : first + 100]
        found = post(client, "/v1/sentiment", input=[row["text"] for row in part])["data"]
        hits += sum(entry["label"] == row["label"] for entry, row in zip(found, part, strict=True))
    evaluation = json.loads((ROOT / "checkpoints" / ENCODER / "evaluation.json").read_text())
    assert hits / len(rows) == pytest.approx(evaluation["through_the_service"]["sentiment"]["accuracy"], abs=0.002)
    assert hits / len(rows) == pytest.approx(evaluation["sentiment"]["accuracy"], abs=0.01)
