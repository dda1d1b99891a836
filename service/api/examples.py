"""One body for each endpoint that takes one, as the description and its page show it: short, and answered as it stands.

Knows paths alone; what a body may be, the endpoints' own types say. API process only.
"""

from collections.abc import Mapping
from typing import Any

_CONVERSATION = [{"role": "user", "content": "Say hello."}]
_PROMPT = {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 40}}
_STORY = "Tom had a red ball. He played with it in the park. One day a dog took the ball and ran away."
_TEXT, _CLOSE, _FAR = "A happy person.", "A cheerful woman.", "The stock market fell."
_FILM = "A wonderful, touching film."
_QUESTION = {"question": "When was the bridge built?", "context": "The bridge was built in 1887 by Maria Keller."}
_GAME = "The team won the match."
_SOURCE = {"source_sentence": _TEXT, "sentences": [_CLOSE, _FAR]}
_EMBEDDINGS = {"input": [_CLOSE, _FAR]}
_SCORE = {"text_1": _TEXT, "text_2": [_CLOSE, _FAR]}
_DOCUMENTS = {"query": "Who is glad?", "documents": [_FAR, _CLOSE]}

EXAMPLES: Mapping[str, Mapping[str, Any]] = {
    "/v1/completions": {"prompt": "Once upon a time", "max_tokens": 40},
    "/v1/chat/completions": {"messages": _CONVERSATION, "max_tokens": 60},
    "/v1/responses": {"input": "Say hello.", "max_output_tokens": 60},
    "/v1/messages": {"model": "slimpajama-tiny-lm", "max_tokens": 60, "messages": _CONVERSATION},
    "/v1/messages/count_tokens": {"model": "slimpajama-tiny-lm", "messages": _CONVERSATION},
    "/v1/embeddings": _EMBEDDINGS,
    "/embeddings": _EMBEDDINGS,
    "/v1/sparse_embeddings": _EMBEDDINGS,
    "/v1/similarity": {"source": _TEXT, "targets": [_CLOSE, _FAR]},
    "/v1/rerank": _DOCUMENTS,
    "/v2/rerank": _DOCUMENTS,
    "/rerank": _DOCUMENTS,
    "/v1/embed": {"texts": [_CLOSE, _FAR], "input_type": "search_document"},
    "/v2/embed": {"texts": [_CLOSE, _FAR], "input_type": "search_document", "embedding_types": ["float", "int8"]},
    "/v1/score": _SCORE,
    "/score": _SCORE,
    "/v1/tokenize": {"text": "the red ball"},
    "/tokenize": {"prompt": "the red ball"},
    "/v1/detokenize": {"tokens": [100, 200, 300]},
    "/detokenize": {"tokens": [100, 200, 300]},
    "/embed": {"inputs": [_CLOSE, _FAR]},
    "/embed_all": {"inputs": _CLOSE},
    "/embed_sparse": {"inputs": [_CLOSE, _FAR]},
    "/predict": {"inputs": _FILM},
    "/similarity": {"inputs": _SOURCE},
    "/decode": {"ids": [100, 200, 300]},
    "/": {"inputs": _CLOSE},
    "/invocations": {"inputs": _CLOSE},
    "/generate": _PROMPT,
    "/generate_stream": _PROMPT,
    "/hf/text-generation": _PROMPT,
    "/classify": {"input": _FILM},
    "/hf/text-classification": {"inputs": _FILM},
    "/hf/token-classification": {"inputs": "Elizabeth went to London."},
    "/hf/zero-shot-classification": {"inputs": _GAME, "parameters": {"candidate_labels": ["politics", "sport"]}},
    "/hf/feature-extraction": {"inputs": [_CLOSE]},
    "/hf/sentence-similarity": {"inputs": _SOURCE},
    "/hf/summarization": {"inputs": _STORY},
    "/hf/translation": {"inputs": "the dog", "parameters": {"src_lang": "en", "tgt_lang": "fr"}},
    "/hf/question-answering": {"inputs": _QUESTION},
    "/v1/classify": {"input": _GAME, "labels": ["politics", "sport"]},
    "/v1/sentiment": {"input": [_FILM]},
    "/v1/tag": {"input": "Elizabeth went to London."},
    "/v1/summarize": {"input": _STORY},
    "/v1/translate": {"input": "the dog", "source": "en", "target": "fr"},
    "/v1/answer": _QUESTION,
    "/admin/models/{name}": {"source": "organization/checkpoint", "switch": False},
    "/v1/load_lora_adapter": {"lora_name": "sql", "lora_path": "organization/sql-adapter"},
    "/v1/unload_lora_adapter": {"lora_name": "sql"},
    "/admin/models/{name}/alias": {"weights": {"1": 0.9, "2": 0.1}},
}
