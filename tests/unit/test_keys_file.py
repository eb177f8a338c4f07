"""The keys file: what is written is read, what is wrong is told by name, and no edit loses a key."""

import contextlib
import json
import os
import stat
import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarn.cli import main
from kvarn.errors import ConfigError
from kvarn.server.keys.file import add_key, parse_keys, read_keys, remove_key
from kvarn.server.keys.records import Key, KeySet, digest
from kvarn.server.keys.ring import KeyRing

SALT, DIGEST = "ab" * 32, "cd" * 32
GOOD = {"version": 1, "salt": SALT, "keys": {"ann": {"digest": DIGEST, "priority": 3}}}


@pytest.fixture(params=["keys.toml", "keys.json"])
def path(request, tmp_path):
    return tmp_path / request.param


def test_what_is_added_is_good_until_it_is_removed(path):
    ann = add_key(path, "ann", tenant="team ü", priority=-5, requests_per_minute=60, tokens_per_minute=1000)
    bob = add_key(path, "bob", max_concurrency=3, cache_salt='quote " and \\ and 💧', keep_alive=True)
    keys = read_keys(path)
    first, second = keys.find(ann), keys.find(bob)
    assert (first.name, first.tenant, first.priority) == ("ann", "team ü", -5)
    assert (first.requests_per_minute, first.tokens_per_minute, first.max_concurrency) == (60, 1000, None)
    assert (second.tenant, second.cache_salt, second.max_concurrency) == ("bob", 'quote " and \\ and 💧', 3)
    assert (first.keep_alive, second.keep_alive) == (False, True)
    assert keys.find(ann + "x") is None
    assert ann not in path.read_text()
    assert digest(keys.salt, ann) == first.digest
    remove_key(path, "ann")
    assert read_keys(path).find(ann) is None
    assert read_keys(path).find(bob) == second


def test_names_are_given_once_and_must_be_known(path):
    add_key(path, "ann")
    with pytest.raises(ConfigError, match="has a key 'ann' already"):
        add_key(path, "ann")
    with pytest.raises(ConfigError, match="has no key 'bob'; it has ann"):
        remove_key(path, "bob")
    before = path.read_text()
    for name in ("", "a b", "a.b", "ü"):
        with pytest.raises(ConfigError, match="name must be"):
            add_key(path, name)
    with pytest.raises(ConfigError, match="requests_per_minute must be between 1"):
        add_key(path, "bob", requests_per_minute=0)
    assert path.read_text() == before


def test_comments_and_other_keys_outlive_edits(tmp_path):
    path = tmp_path / "keys.toml"
    add_key(path, "ann")
    path.write_text(path.read_text() + "# by hand\n[ keys . \"bob\" ] # him\ndigest = '" + DIGEST + "'\n# last\n")
    add_key(path, "cid")
    remove_key(path, "ann")
    text = path.read_text()
    assert text.startswith("# Keys of")
    assert [key.name for key in read_keys(path).keys] == ["bob", "cid"]
    remove_key(path, "bob")
    assert [key.name for key in read_keys(path).keys] == ["cid"]


def test_what_cannot_be_edited_is_left_as_it_is(tmp_path):
    path = tmp_path / "keys.toml"
    path.write_text(f'salt = "{SALT}"\nkeys.ann.digest = "{DIGEST}"\nkeys.bob.digest = "{SALT}"\n')
    before = path.read_text()
    with pytest.raises(ConfigError, match="cannot edit; change it by hand"):
        remove_key(path, "ann")
    assert path.read_text() == before
    assert os.listdir(tmp_path) == ["keys.toml"]


def test_the_mode_of_the_file_stays_and_a_new_one_is_its_owners(path):
    add_key(path, "ann")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o640)
    add_key(path, "bob")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def changed(*place, to):
    """`GOOD` with another value somewhere, as JSON."""
    value = json.loads(json.dumps(GOOD))
    inner = value
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = to
    return json.dumps(value)


WRONG = [
    ("", "it is no JSON"),
    ("[" * 100_000, "nested too deep"),
    ("[]", "the file must be a table"),
    ('{"keys": {}}', "salt must be 64 hex digits"),
    ('{"keys": {}, "keys": {}}', "'keys' is there twice"),
    (changed("salt", to="zz" * 32), "salt must be 64 hex digits"),
    (changed("salt", to=SALT.upper()), "salt must be 64 hex digits"),
    (changed("version", to=2), "version must be 1, not 2"),
    (changed("version", to=True), "version must be 1"),
    (changed("kyes", to={}), "unknown field 'kyes'; there are keys, salt, version"),
    (changed("keys", to=[]), "keys must be a table"),
    (changed("keys", to={f"k{n}": {} for n in range(1025)}), "at most 1024 keys, not 1025"),
    (changed("keys", "ann", to="key"), "keys.ann must be a table"),
    (changed("keys", "a b", to={"digest": SALT}), "name must be"),
    (changed("keys", "ann", "digest", to=DIGEST[:-2]), "keys.ann: digest must be 64 hex digits"),
    (changed("keys", "ann", "digest", to=None), "keys.ann: digest must be 64 hex digits"),
    (changed("keys", "ann", "rate", to=5), "keys.ann has an unknown field 'rate'"),
    (changed("keys", "ann", "priority", to="high"), "keys.ann.priority must be a whole number"),
    (changed("keys", "ann", "priority", to=1.5), "keys.ann.priority must be a whole number"),
    (changed("keys", "ann", "max_concurrency", to=True), "keys.ann.max_concurrency must be a whole number"),
    (changed("keys", "ann", "keep_alive", to=1), "keys.ann.keep_alive must be true or false"),
    (changed("keys", "ann", "tokens_per_minute", to=0), "keys.ann: tokens_per_minute must be between 1"),
    (changed("keys", "ann", "tenant", to=5), "keys.ann.tenant must be a text"),
    (changed("keys", "ann", "tenant", to="a\u0007"), "keys.ann: tenant must be at most 64 printable"),
    (changed("keys", "bob", to={"digest": DIGEST}), "ann and bob are the same key"),
]


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_what_is_wrong_is_told_with_the_file_and_the_place(case, tmp_path):
    text, message = WRONG[case]
    path = tmp_path / "keys.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        read_keys(path)
    assert str(path) in str(refused.value)
    assert message in str(refused.value)
    assert len(str(refused.value)) < 600


def test_files_that_are_none(tmp_path):
    with pytest.raises(ConfigError, match=r"--keys-file: cannot read .*: No such file"):
        read_keys(tmp_path / "keys.toml")
    with pytest.raises(ConfigError, match=r"cannot read .*: Is a directory"):
        read_keys(tmp_path)
    path = tmp_path / "keys.toml"
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="not UTF-8 at byte 0"):
        read_keys(path)
    path.write_bytes(b" " * ((4 << 20) + 1))
    with pytest.raises(ConfigError, match="at most 4194304 bytes"):
        read_keys(path)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=70) | st.just(DIGEST),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(
        st.text(max_size=5) | st.sampled_from(["salt", "keys", "version", "digest", "tenant", "priority"]),
        inner, max_size=5,
    ),
    max_leaves=12,
)  # fmt: skip
FIELDS = st.dictionaries(
    st.sampled_from(["digest", "tenant", "cache_salt", "priority", "requests_per_minute", "max_concurrency", "x"]),
    JSON_VALUES, max_size=4,
)  # fmt: skip


def taken(text, path):
    """The keys, or None where they are refused; anything but a ConfigError is a fault."""
    with contextlib.suppress(ConfigError):
        return parse_keys(text, path)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_anything_is_read_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / data.draw(st.sampled_from(["k.toml", "k.json"]))
    text = data.draw(st.text(max_size=200) | JSON_VALUES.map(json.dumps))
    found = taken(text, path)
    assert found is None or isinstance(found, KeySet)
    keys = data.draw(st.dictionaries(st.text(max_size=5) | st.just("ann"), FIELDS | JSON_VALUES, max_size=3))
    found = taken(json.dumps({"salt": SALT, "keys": keys}), path.with_suffix(".json"))
    if found is not None:
        assert all(isinstance(key, Key) and key.tenant for key in found.keys)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.from_regex(r"[A-Za-z0-9_-]{1,12}", fullmatch=True),
        st.fixed_dictionaries({}, optional={
            "tenant": st.text(max_size=20).filter(lambda t: t.isprintable() and t),
            "cache_salt": st.text(max_size=20).filter(str.isprintable),
            "priority": st.integers(-(2**31), 2**31 - 1),
            "tokens_per_minute": st.integers(1, 10**12),
        }),
        min_size=1, max_size=5,
    ),
    st.sampled_from(["toml", "json"]),
    st.randoms(),
)  # fmt: skip
def test_any_edits_keep_every_other_key(tmp_path_factory, wanted, kind, random):
    path = tmp_path_factory.mktemp("keys") / f"keys.{kind}"
    secrets = {name: add_key(path, name, **fields) for name, fields in wanted.items()}
    names = list(wanted)
    random.shuffle(names)
    while names:
        keys = read_keys(path)
        assert {key.name for key in keys.keys} == set(names)
        for name in names:
            found = keys.find(secrets[name])
            assert {field: getattr(found, field) for field in wanted[name]} == wanted[name]
        remove_key(path, names.pop())
    assert read_keys(path).keys == ()


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_a_ring_takes_changes_and_keeps_what_is_good_where_they_are_wrong(tmp_path, caplog):
    path, clock = tmp_path / "keys.toml", Clock()
    ann = add_key(path, "ann", max_concurrency=1)
    ring = KeyRing((), path, clock=clock)
    account = ring.find(ann)
    visit = account.begin()
    bob = add_key(path, "bob")
    assert ring.find(bob) is None, "the file is not looked at for every request"
    clock.now += 1
    assert ring.find(bob).name == "bob"
    assert ring.find(ann) is account, "what a key has used is not forgotten"
    good = path.read_text()

    path.write_text(good + "nonsense")
    clock.now += 1
    assert ring.find(bob).name == "bob"
    assert [record.levelname for record in caplog.records if "was not taken" in record.message] == ["ERROR"]
    clock.now += 1
    ring.find(bob)
    assert len([record for record in caplog.records if "was not taken" in record.message]) == 1, "told once"

    path.unlink()
    clock.now += 1
    assert ring.find(bob).name == "bob"
    assert "No such file" in caplog.text

    path.write_text(good.replace("max_concurrency = 1", "max_concurrency = 2"))
    clock.now += 1
    assert ring.find(ann) is account
    account.begin().end(0)
    remove_key(path, "ann")
    clock.now += 1
    assert ring.find(ann) is None
    visit.end(0)  # of a request that was in flight
    for secret in (ann, bob):
        assert secret not in caplog.text


def test_priorities_need_a_policy_that_looks_at_them(tmp_path, caplog):
    path, clock = tmp_path / "keys.toml", Clock()
    ann = add_key(path, "ann")
    ring = KeyRing((), path, with_priorities=False, clock=clock)
    add_key(path, "bob", priority=1)
    clock.now += 1
    assert ring.find(ann).name == "ann"
    assert "keys.bob.priority must be 0, not 1: only --policy priority looks at it" in caplog.text
    with pytest.raises(ConfigError, match="only --policy priority"):
        KeyRing((), path, with_priorities=False)


def test_a_file_without_keys_lets_nobody_in(tmp_path):
    path = tmp_path / "keys.toml"
    path.write_text(f'salt = "{SALT}"')
    ring = KeyRing((), path)
    assert ring
    assert ring.find("") is None
    assert not KeyRing()


def run(capsys, *arguments):
    """(exit code, stdout, stderr) of a command."""
    with pytest.raises(SystemExit) as end:
        main(["keys", *arguments])
    said = capsys.readouterr()
    return end.value.code, said.out, said.err


def test_the_command_line(tmp_path, capsys, monkeypatch):
    import io

    path = tmp_path / "keys.toml"
    file = ("--keys-file", str(path))
    code, secret, said = run(capsys, "add", "ann", *file, "--requests-per-minute", "60", "--tenant", "lab")
    assert code == 0
    assert secret.startswith("kvarn-")
    assert "kept nowhere" in said
    assert tomllib.loads(path.read_text())["keys"]["ann"]["requests_per_minute"] == 60
    run(capsys, "add", "bob", *file)
    code, table, _ = run(capsys, "list", *file)
    assert table.splitlines() == [
        "name  tenant  priority  requests/min  tokens/min  concurrency",
        "ann   lab            0            60           -            -",
        "bob   bob            0             -           -            -",
    ]
    assert run(capsys, "check", *file)[:2] == (0, f"{path} is good: 2 keys.\n")
    for line, expected in ((secret, (0, "ann\n")), ("other\n", (1, ""))):
        monkeypatch.setattr("sys.stdin", io.StringIO(line))
        assert run(capsys, "check", *file, "--stdin")[:2] == expected
    assert run(capsys, "remove", "ann", *file)[0] == 0
    code, _, said = run(capsys, "remove", "ann", *file)
    assert code == 1
    assert "has no key 'ann'; it has bob" in said
    path.write_text("[")
    code, _, said = run(capsys, "check", *file)
    assert code == 1
    assert "it is no TOML" in said
    assert "Traceback" not in said
