"""Settings: who wins, what is refused, and that a slip of the pen is told from a setting."""

from pathlib import Path

import pytest

from service.model_source import ModelSource
from service.settings import Settings, load_settings, setting_lines
from service.settings_sources import SettingsError


@pytest.fixture
def yaml_file(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "settings.yaml"
        path.write_text(text)
        return path

    return write


def test_flag_beats_environment_beats_yaml_beats_default(monkeypatch, yaml_file):
    path = yaml_file("port: 1111\nmax_sequences: 11\nblock_size: 8\n")
    monkeypatch.setenv("SLIMPAJAMA_PORT", "2222")
    monkeypatch.setenv("SLIMPAJAMA_MAX_SEQUENCES", "22")
    settings = load_settings({"port": "3333", "config": str(path)})
    assert (settings.port, settings.max_sequences, settings.block_size) == (3333, 22, 8)
    assert settings.max_batch_tokens == 512


def test_yaml_file_may_be_named_by_the_environment(monkeypatch, yaml_file):
    monkeypatch.setenv("SLIMPAJAMA_CONFIG", str(yaml_file("model: [a/b, c/d=e@2]\noffline: yes\n")))
    settings = load_settings({})
    assert settings.model == (ModelSource("a/b", "a/b"), ModelSource("c/d", "e", "2"))
    assert settings.offline is True


def test_lists_in_the_environment_are_separated_by_commas(monkeypatch):
    monkeypatch.setenv("SLIMPAJAMA_MODEL", "a/b=x, c/d=y")
    monkeypatch.setenv("SLIMPAJAMA_CORS_ORIGINS", "https://one.example,https://two.example")
    settings = load_settings({})
    assert [source.name for source in settings.model] == ["x", "y"]
    assert settings.cors_origins == ("https://one.example", "https://two.example")


def test_an_empty_variable_counts_as_unset(monkeypatch):
    monkeypatch.setenv("SLIMPAJAMA_PORT", "")
    assert load_settings({}).port == 8000


@pytest.mark.parametrize(("text", "num_bytes"), [("512MiB", 2**29), ("2GiB", 2**31), ("1.5GiB", 3 * 2**29), ("64", 64)])
def test_memory_sizes_are_read_with_their_unit(text, num_bytes):
    assert load_settings({"kv_cache_memory": text}).kv_cache_memory == num_bytes


@pytest.mark.parametrize("name", ["SLIMPAJAMA_PROT", "slimpajama_port", "SLIMPAJAMA_PORTS"])
def test_misspelt_variable_is_an_error_that_suggests_the_right_one(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    with pytest.raises(SettingsError, match=rf"unknown variable '{name}'(: did you mean 'SLIMPAJAMA_PORT'\?)?"):
        load_settings({})


def test_service_links_of_kubernetes_are_not_settings(monkeypatch):
    """A Service called "slimpajama" makes Kubernetes set SLIMPAJAMA_PORT=tcp://... in every pod of its namespace."""
    for name, value in {
        "SLIMPAJAMA_PORT": "tcp://10.0.0.1:80",
        "SLIMPAJAMA_SERVICE_HOST": "10.0.0.1",
        "SLIMPAJAMA_SERVICE_PORT": "80",
        "SLIMPAJAMA_SERVICE_PORT_HTTP": "80",
        "SLIMPAJAMA_PORT_80_TCP": "tcp://10.0.0.1:80",
        "SLIMPAJAMA_PORT_80_TCP_ADDR": "10.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    assert load_settings({}).port == 8000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot: 1", "unknown setting 'prot': did you mean 'port'"),
        ("max-sequences: 1", "did you mean 'max_sequences'"),
        ("- port", "must hold `setting: value` lines, not a list"),
        ("port: 1\nport: 2", "'port' is given twice"),
        ("port: [", "cannot read the settings"),
        ("config: other.yaml", "unknown setting 'config'"),
    ],
)
def test_faulty_yaml_is_an_error_that_names_file_and_fault(yaml_file, text, message):
    path = yaml_file(text)
    with pytest.raises(SettingsError, match=message) as caught:
        load_settings({"config": str(path)})
    assert str(path) in str(caught.value)


def test_missing_yaml_file_is_an_error(tmp_path):
    with pytest.raises(SettingsError, match="cannot read the settings"):
        load_settings({"config": str(tmp_path / "none.yaml")})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "65536"),
        ("port", "-1"),
        ("port", "eight"),
        ("block_size", "0"),
        ("kv_cache_memory", "0"),
        ("kv_cache_memory", "much"),
        ("kv_cache_fraction", "1.5"),
        ("drain_timeout", "inf"),
        ("drain_timeout", "nan"),
        ("device", "tpu"),
        ("dtype", "float8"),
        ("log_format", "xml"),
        ("host", ""),
        ("api_keys_file", "/does/not/exist"),
        ("model", ["=name"]),
        ("model", ["a/b=no good"]),
        ("model", ["a/b=x", "c/d=x"]),
        ("max_json_depth", "100000"),
        ("rate_limit_tokens", "0"),
    ],
)
def test_value_out_of_range_is_an_error_that_names_the_setting(name, value):
    with pytest.raises(SettingsError, match=name):
        load_settings({name: value})


def test_aliases_stand_for_served_names(monkeypatch):
    monkeypatch.setenv("SLIMPAJAMA_MODEL", "a/b=small@2,c/d")
    monkeypatch.setenv("SLIMPAJAMA_ALIAS", "gpt-4o=small, gpt-4o-mini=small@2 ,text-embedding-3-small=c/d")
    assert load_settings({}).aliases == {
        "gpt-4o": "small",
        "gpt-4o-mini": "small@2",
        "text-embedding-3-small": "c/d",
    }


def test_adapters_are_named_as_models_are(monkeypatch):
    monkeypatch.setenv("SLIMPAJAMA_ADAPTER", "a/sql,c/poems=poet@2")
    settings = load_settings({"model": ["a/b=base"], "alias": ["poems=poet"]})
    assert settings.adapter == (ModelSource("a/sql", "a/sql"), ModelSource("c/poems", "poet", "2"))
    assert settings.aliases == {"poems": "poet"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"adapter": ["c/d=base@2"]}, "'base' is the name of a checkpoint and of an adapter"),
        ({"adapter": ["c/d=x", "e/f=x"]}, "model name 'x' is given twice"),
        ({"adapter": ["c/d=x"], "alias": ["x=base"]}, "alias 'x' is the name of a checkpoint"),
        ({"adapter": ["c/d=x"], "tensor_parallel_size": "2"}, "give it as a model, merged"),
    ],
)
def test_an_adapter_that_cannot_be_is_an_error(more, message):
    with pytest.raises(SettingsError, match=message):
        load_settings({"model": ["a/b=base"], **more})


@pytest.mark.parametrize(
    ("aliases", "message"),
    [
        (["gpt-4o=large"], "alias 'gpt-4o': there is no checkpoint 'large'; served: other, small"),
        (["gpt-4o=gpt-4", "gpt-4=small"], "there is no checkpoint 'gpt-4'"),
        (["small=other"], "alias 'small' is the name of a checkpoint"),
        (["gpt-4o=small", "gpt-4o=other"], "'gpt-4o' is given twice"),
        (["gpt-4o"], "must be ALIAS=NAME"),
        (["gpt 4o=small"], "must be ALIAS=NAME"),
        (["=small"], "must be ALIAS=NAME"),
    ],
)
def test_an_alias_that_cannot_be_is_an_error(aliases, message):
    with pytest.raises(SettingsError, match=message):
        load_settings({"model": ["a/b=small", "c/d=other"], "alias": aliases})


def test_tls_needs_certificate_and_key(tmp_path):
    file = tmp_path / "some.pem"
    file.write_text("x")
    with pytest.raises(SettingsError, match="go together"):
        load_settings({"tls_certificate": str(file)})


def test_ranks_cannot_overlap():
    with pytest.raises(SettingsError, match="overlap"):
        load_settings({"overlap": "on", "tensor_parallel_size": 2})
    assert load_settings({"overlap": "auto", "tensor_parallel_size": 2}).tensor_parallel_size == 2


def test_a_draft_is_a_location_and_the_name_that_it_guesses_for():
    settings = load_settings({"model": ["a/b=x", "c/d=x@2", "e/f"], "draft": ["g/h=x", "./small.gguf=e/f"]})
    assert settings.drafts == {"x": "g/h", "e/f": "./small.gguf"}
    assert settings.speculative_tokens is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draft": ["g/h"]}, "there is no checkpoint 'g/h' that it could guess for; write g/h=SERVED_NAME; served: x"),
        ({"draft": ["g/h=y"]}, "there is no checkpoint 'y'"),
        ({"draft": ["g/h=x@2"]}, "it goes with all versions of a name; leave out @2"),
        ({"draft": ["g/h=x", "i/j=x"]}, "a name has two drafts"),
        ({"draft": ["g/h=x"], "tensor_parallel_size": 2}, "draft is not to be had with tensor_parallel_size above 1"),
        ({"draft": ["g/h=x"], "overlap": "on"}, "overlap is not to be had with draft"),
        ({"draft": ["g/h=x"], "speculative_tokens": 0}, "draft and speculative_tokens 0 contradict each other"),
        ({"draft": ["g/h=a"], "adapter": ["c/d=a"]}, "there is no checkpoint 'a'"),
    ],
)
def test_a_draft_that_has_nothing_to_guess_for_is_refused(changes, message):
    with pytest.raises(SettingsError, match=message):
        load_settings({"model": ["a/b=x"], **changes})


def test_no_auth_contradicts_a_key_file(tmp_path):
    file = tmp_path / "keys"
    file.write_text("a:12345678")
    with pytest.raises(SettingsError, match="contradict"):
        load_settings({"api_keys_file": str(file), "no_auth": True})


def test_an_api_key_is_read_and_never_shown(monkeypatch):
    monkeypatch.setenv("SLIMPAJAMA_API_KEY", "sk-0123456789")
    settings = load_settings({})
    assert settings.api_key is not None
    assert settings.api_key.get_secret_value() == "sk-0123456789"
    assert settings.has_keys
    assert "0123456789" not in f"{settings!r} {settings} {settings.model_dump_json()}"


def test_a_faulty_api_key_is_told_without_the_key(monkeypatch):
    monkeypatch.setenv("SLIMPAJAMA_API_KEY", "sk 0123456789")
    with pytest.raises(SettingsError, match=r"api_key = \.\.\.: a key is 8 to 512 printable") as caught:
        load_settings({})
    assert "0123456789" not in f"{caught.value} {caught.value.__cause__}"


def test_no_auth_contradicts_an_api_key():
    with pytest.raises(SettingsError, match="no_auth and api_key contradict"):
        load_settings({"api_key": "sk-0123456789", "no_auth": True})


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Settings().port = 1


@pytest.mark.parametrize(
    ("host", "public"),
    [
        ("127.0.0.1", False),
        ("127.1.2.3", False),
        ("::1", False),
        ("localhost", False),
        ("0.0.0.0", True),
        ("::", True),
        ("192.168.0.7", True),
        ("somewhere.example", True),
    ],
)
def test_only_loopback_addresses_are_private(host, public):
    assert Settings(host=host).is_public is public


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("owner/model", ModelSource("owner/model", "owner/model")),
        ("owner/model@2", ModelSource("owner/model", "owner/model", "2")),
        ("owner/model=small", ModelSource("owner/model", "small")),
        ("owner/model=small@2", ModelSource("owner/model", "small", "2")),
        ("./models/tiny", ModelSource("./models/tiny", "tiny")),
        ("/srv/models/tiny/", ModelSource("/srv/models/tiny/", "tiny")),
        ("/srv/a=b/tiny=x@v1.2", ModelSource("/srv/a=b/tiny", "x", "v1.2")),
    ],
)
def test_model_text_is_location_name_and_version(text, expected):
    assert ModelSource.parse(text) == expected


def test_existing_folder_is_taken_whole(tmp_path):
    folder = tmp_path / "run=7@best"
    folder.mkdir()
    with pytest.raises(ValueError, match="add =NAME"):
        ModelSource.parse(str(folder))
    assert ModelSource.parse(f"{folder}=best") == ModelSource(str(folder), "best")


def test_every_setting_has_a_group_a_description_and_a_shown_default():
    lines = setting_lines()
    assert {line.field for line in lines} == set(Settings.model_fields)
    assert all(line.group and line.description and line.default for line in lines)
    assert next(line for line in lines if line.field == "dtype").choices == ("auto", "float32", "bfloat16", "float16")
