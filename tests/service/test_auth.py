"""API keys: read, hashed, compared, reloaded."""

import hashlib
import logging
import os

import pytest

from service.auth import Authenticator, KeyFile, KeyFileError, parse_keys

KEY = "sk-0123456789abcdef"


@pytest.fixture
def key_file(tmp_path):
    """Writes the file anew, with a modification time that differs each time."""
    path = tmp_path / "keys"
    versions = iter(range(1, 100))

    def write(text):
        path.write_text(text)
        os.utime(path, (next(versions), next(versions)))
        return path

    return write


def test_plain_and_hashed_keys_are_known_by_their_names(key_file):
    hashed = hashlib.sha256(b"another-secret").hexdigest()
    keys = KeyFile(key_file(f"# people\nalice:{KEY}\n\nbob:sha256:{hashed}\n"))
    assert keys.find(KEY, now=0.0) == "alice"
    assert keys.find("another-secret", now=0.0) == "bob"
    assert keys.find(KEY + "x", now=0.0) is None
    assert keys.find("", now=0.0) is None
    assert keys.find("schlüssel-ß", now=0.0) is None


def test_keys_are_kept_as_hashes_only(key_file):
    keys = KeyFile(key_file(f"alice:{KEY}\n"))
    assert KEY not in repr(vars(keys))


def test_a_key_may_hold_colons(key_file):
    assert KeyFile(key_file("alice:part:one:two\n")).find("part:one:two", now=0.0) == "alice"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no key"),
        ("# nothing\n", "holds no key"),
        ("justakeywithoutname", "line 1"),
        ("alice:12345678\nalice:87654321", "line 2: the name 'alice'"),
        ("alice:short", "line 1: a key is 8 to 512"),
        ("alice:has a space", "line 1: a key is"),
        ("alice:sha256:abc", "64 hex digits"),
        ("al ice:12345678", "line 1"),
    ],
)
def test_faulty_key_file_is_an_error_that_names_the_line_but_not_the_key(text, message):
    with pytest.raises(KeyFileError, match=message) as caught:
        parse_keys(text, "keys.txt")
    assert "12345678" not in str(caught.value)
    assert "justakey" not in str(caught.value)


def test_changed_file_is_read_again_but_looked_at_once_a_second(key_file):
    keys = KeyFile(key_file(f"alice:{KEY}\n"))
    assert keys.find(KEY, now=10.0) == "alice"
    key_file("bob:other-key-1\n")
    assert keys.find(KEY, now=10.5) == "alice"
    assert keys.find(KEY, now=11.5) is None
    assert keys.find("other-key-1", now=11.5) == "bob"


@pytest.mark.parametrize("change", ["broken", "gone"])
def test_unreadable_change_keeps_the_former_keys(key_file, caplog, change):
    path = key_file(f"alice:{KEY}\n")
    keys = KeyFile(path)
    if change == "gone":
        path.unlink()
    else:
        key_file("nonsense\n")
    with caplog.at_level(logging.ERROR):
        assert keys.find(KEY, now=5.0) == "alice"
        assert keys.find(KEY, now=10.0) == "alice"
    assert caplog.text.count("not reloaded") == (1 if change == "broken" else 2)
    key_file("bob:other-key-1\n")
    assert keys.find("other-key-1", now=15.0) == "bob"


def test_management_keys_are_apart_from_the_others(tmp_path):
    (tmp_path / "api").write_text(f"alice:{KEY}\n")
    (tmp_path / "admin").write_text("root:root-key-12345\n")
    authenticator = Authenticator(tmp_path / "api", tmp_path / "admin")
    assert authenticator.client(KEY, 0.0) == "alice"
    assert authenticator.manager(KEY, 0.0) is None
    assert authenticator.manager("root-key-12345", 0.0) == "root"
    assert authenticator.client("root-key-12345", 0.0) is None


def test_without_files_nothing_is_needed_and_nobody_manages():
    authenticator = Authenticator(None, None)
    assert not authenticator.needs_key
    assert not authenticator.allows_management
    assert authenticator.manager("anything-at-all", 0.0) is None


def test_a_key_without_a_file_is_known_beside_those_of_the_file(key_file):
    authenticator = Authenticator(key_file(f"alice:{KEY}\n"), None, "the-only-key")
    assert authenticator.client(KEY, 0.0) == "alice"
    assert authenticator.client("the-only-key", 0.0) == "--api-key"
    assert authenticator.client("the-other-key", 0.0) is None
    assert authenticator.manager("the-only-key", 0.0) is None


def test_a_key_without_a_file_is_enough_and_may_be_a_hash():
    authenticator = Authenticator(None, None, f"sha256:{hashlib.sha256(KEY.encode()).hexdigest()}")
    assert authenticator.needs_key
    assert authenticator.client(KEY, 0.0) == "--api-key"
    assert authenticator.client("", 0.0) is None
    assert KEY not in repr(vars(Authenticator(None, None, KEY)))
