"""The training networks against `transformers`, by way of the checkpoints that we export."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from model.training.export import export_encoder, export_language_model, load_encoder, load_language_model
from model.training.rounding import stored
from model.training.teacher import restrict_vocabulary
from model.training.tokenizers import train_byte_bpe


def rounded(network):
    """The network with its weights rounded to what the checkpoint stores."""
    for parameter in network.parameters():
        parameter.data = stored(parameter.data).float()
    return network.eval()


@pytest.fixture
def tokenizer():
    return train_byte_bpe(["some words to learn pieces from"], 300)


@torch.inference_mode()
def test_exported_language_model_gives_the_logits_of_transformers(make_llama, tokenizer, tmp_path):
    network = make_llama()
    for parameter in network.parameters():
        parameter.data *= 5  # far from the start, where every layer is near zero
    rounded(network)
    export_language_model(network, tokenizer, tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(0, 300, (2, 33))
    ours = network.logits(network(ids))
    assert reference.dtype == torch.float32
    np.testing.assert_allclose(ours, reference(ids).logits, atol=5e-5, rtol=1e-4)
    assert reference.generation_config.eos_token_id == [tokenizer.token_to_id("<|im_end|>"), 0]


@torch.inference_mode()
def test_exported_encoder_gives_the_states_of_transformers_on_padded_pairs(make_bert, tmp_path):
    network = rounded(make_bert())
    export_encoder(network, tmp_path, max_tokens=32)
    reference = AutoModel.from_pretrained(tmp_path, add_pooling_layer=False)
    ids, mask = torch.randint(1, 120, (3, 17)), torch.ones(3, 17, dtype=torch.bool)
    mask[1, 9:] = mask[2, 4:] = False
    types = (torch.arange(17) > 5).long().expand(3, -1)
    ours = network(ids, mask, types)
    theirs = reference(ids, attention_mask=mask.long(), token_type_ids=types).last_hidden_state
    np.testing.assert_allclose(ours[mask], theirs[mask], atol=5e-5, rtol=1e-4)


@torch.inference_mode()
def test_checkpoints_come_back_as_they_were_written(make_bert, make_llama, tokenizer, tmp_path):
    bert, llama = rounded(make_bert()), rounded(make_llama())
    export_encoder(bert, tmp_path / "encoder", max_tokens=32)
    export_language_model(llama, tokenizer, tmp_path / "lm")
    for network, loaded in ((bert, load_encoder(tmp_path / "encoder")), (llama, load_language_model(tmp_path / "lm"))):
        for name, tensor in network.state_dict().items():
            assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_the_encoder_declares_mean_pooling_and_normalization(make_bert, tmp_path):
    export_encoder(make_bert(), tmp_path, max_tokens=32)
    modules = [module["type"].rsplit(".")[-1] for module in json.loads((tmp_path / "modules.json").read_text())]
    assert modules == ["Transformer", "Pooling", "Normalize"]
    assert json.loads((tmp_path / "1_Pooling" / "config.json").read_text())["pooling_mode_mean_tokens"] is True


@torch.inference_mode()
def test_a_student_reads_the_word_pieces_that_it_keeps_as_the_teacher_does(make_bert):
    teacher, kept = make_bert(num_layers=3).eval(), [0, 3, 7, 50, 119]
    student = restrict_vocabulary(teacher, kept).eval()
    ids = torch.randint(0, len(kept), (2, 12))
    mask = torch.ones_like(ids, dtype=torch.bool)
    assert student.shape.vocab_size == len(kept)
    assert torch.equal(student(ids, mask), teacher(torch.tensor(kept)[ids], mask))
