"""Objects are read as they are in the store or there is one clear error: each fault, mixes of them, closed doors."""

from __future__ import annotations

import importlib.util
import random
import subprocess
import sys
import threading
import time
import urllib.request

import pytest

from puna.base import credentials, objects
from puna.base.console import PunaError
from puna.base.objects import TRIES, head, list_objects, read_parallel, read_range, remove, upload, write

PASSING = ("truncate", "short", "delay", "stall", "drop", "reset", "503", "500")
SECRET = "very-secret-access-key"


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch) -> None:
    monkeypatch.setattr(objects, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(objects, "LONGEST_WAIT", 0.002)
    monkeypatch.setattr(objects, "_last_line", -1e9)


@pytest.fixture
def data() -> bytes:
    return random.Random(1).randbytes(300_000)


@pytest.fixture
def url(s3_bucket, data) -> str:
    write(f"{s3_bucket}/web/a b%20é.bin", data)
    return f"{s3_bucket}/web/a b%20é.bin"


def test_read_write_and_head(url, s3_bucket, data) -> None:
    assert read_range(url, 0, len(data)) == data
    assert read_range(url, 7, 1000) == data[7:1000]
    assert read_range(url, 5, 5) == b""
    assert head(url).size == len(data)
    assert head(url).path == url
    assert head(f"{s3_bucket}/web/other") is None
    assert head(f"{s3_bucket}/web") is None
    assert head(s3_bucket) is None


def test_large_objects_go_in_parts_both_ways(s3_bucket) -> None:
    data = random.Random(2).randbytes(12 << 20)
    write(f"{s3_bucket}/large", memoryview(data))
    pieces = list(read_parallel(f"{s3_bucket}/large", len(data)))
    assert [len(piece) for piece in pieces] == [8 << 20, 4 << 20]
    assert b"".join(pieces) == data


@pytest.mark.parametrize("fault", PASSING)
def test_one_fault_is_mended_silently(url, data, fault_proxy, fault, monkeypatch, capsys) -> None:
    if fault == "stall":
        monkeypatch.setenv("PUNA_STORE_TIMEOUT", "0.3")
    fault_proxy.script(fault)
    assert read_range(url, 0, len(data)) == data
    assert sum(fault_proxy.gets.values()) == (1 if fault == "delay" else 2)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("seed", range(3))
def test_a_mix_of_faults_reads_the_same_bytes(url, data, fault_proxy, seed) -> None:
    fault_proxy.mix(seed, 0.4, tuple(f for f in PASSING if f != "stall"))
    pieces = list(read_parallel(url, len(data), part=20_000, at_once=4))
    assert b"".join(pieces) == data
    assert sum(fault_proxy.gets.values()) > len(pieces) == 15


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("503", "503 SlowDown"),
        ("500", "500 InternalError"),
        ("drop", "the connection broke"),
        ("truncate", "the answer was cut short"),
        ("short", "the answer held 150000 of 300000 bytes"),
        ("stall", "time-out"),
    ],
)
def test_a_fault_that_stays_is_one_error_after_the_tries(url, data, fault_proxy, fault, reason, monkeypatch) -> None:
    if fault == "stall":
        monkeypatch.setenv("PUNA_STORE_TIMEOUT", "0.1")
    fault_proxy.always(fault)
    with pytest.raises(PunaError) as caught:
        read_range(url, 0, len(data))
    assert caught.value.message.startswith(f"{url} did not answer after {TRIES} tries in ")
    assert caught.value.message.endswith(reason)
    assert sum(fault_proxy.gets.values()) == TRIES


def test_one_part_that_fails_for_good_ends_the_whole_read(url, data, fault_proxy) -> None:
    fault_proxy.script("pass", "pass", "403")
    with pytest.raises(PunaError, match="no permission"):
        list(read_parallel(url, len(data), part=20_000, at_once=1))
    assert sum(fault_proxy.gets.values()) <= 5


def test_a_reader_that_leaves_stops_the_tries(url, data, fault_proxy, monkeypatch) -> None:
    monkeypatch.setattr(objects, "FIRST_WAIT", 60.0)
    monkeypatch.setattr(objects, "LONGEST_WAIT", 60.0)
    failed, judge = threading.Event(), objects._judge

    def told(*args) -> str:
        failed.set()
        return judge(*args)

    monkeypatch.setattr(objects, "_judge", told)
    fault_proxy.script("pass", "503")
    stream = read_parallel(url, len(data), part=20_000, at_once=1)
    assert next(stream) == data[:20_000]
    assert failed.wait(30)
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("puna-read")]
    stream.close()
    for thread in threads:
        thread.join(10)  # its next try would be in 30 s
    assert threads
    assert not any(thread.is_alive() for thread in threads)


def test_a_head_without_an_answer_is_tried_again(url, data, fault_proxy) -> None:
    fault_proxy.script("503", "drop", "500", kind="head")
    assert head(url).size == len(data)


def test_later_tries_are_told_and_not_too_often(url, data, fault_proxy, capsys) -> None:
    fault_proxy.script("503", "503", "503", "503")
    assert read_range(url, 0, len(data)) == data
    assert capsys.readouterr().err == f"{url}: 503 SlowDown, try 3 of {TRIES}\n"


def test_waits_grow_up_to_the_cap(monkeypatch) -> None:
    monkeypatch.setattr(objects, "FIRST_WAIT", 0.1)
    monkeypatch.setattr(objects, "LONGEST_WAIT", 1.0)
    waits: list[float] = []

    class Clock:
        def wait(self, seconds: float) -> bool:
            waits.append(seconds)
            return False

    def fail() -> None:
        raise objects._Trouble("broken")

    with pytest.raises(PunaError, match="broken"):
        objects._persist("s3://b/k", "read", fail, Clock())
    assert len(waits) == TRIES - 1
    for wait, middle in zip(waits, (0.1, 0.3, 0.9, 1.0, 1.0), strict=True):
        assert 0.5 * middle <= wait <= 1.5 * middle + 1e-9


@pytest.mark.parametrize(("fault", "reason"), [("403", "403 AccessDenied"), ("400", "400 ExpiredToken")])
@pytest.mark.parametrize("kind", ["get", "list", "put"])
def test_no_permission_is_said_at_once_and_without_secrets(url, s3_bucket, fault_proxy, fault, reason, kind) -> None:
    fault_proxy.always(fault, kind)
    act = {
        "get": lambda: read_range(url, 0, 9),
        "list": lambda: list(list_objects(f"{s3_bucket}/web")),
        "put": lambda: write(url, b"x"),
    }
    before = len(fault_proxy.authorizations)
    with pytest.raises(PunaError) as caught:
        act[kind]()
    verb = {"get": "read", "list": "list", "put": "write"}[kind]
    assert caught.value.message.startswith(f"no permission to {verb} {s3_bucket}/web")
    assert f"({reason}; credentials from AWS_ACCESS_KEY_ID)" in caught.value.message
    assert len(fault_proxy.authorizations) == before + 1
    assert caught.value.__context__ is None
    assert not [word for word in (SECRET, "AKIDPUNATEST") if word in caught.value.message + caught.value.hint]


def test_a_moved_bucket_names_the_region(url, fault_proxy) -> None:
    fault_proxy.always("301")
    with pytest.raises(PunaError, match="another region") as caught:
        read_range(url, 0, 9)
    assert "AWS_REGION" in caught.value.hint


def test_what_does_not_exist(s3_bucket) -> None:
    with pytest.raises(PunaError, match="/absent does not exist"):
        read_range(f"{s3_bucket}/absent", 0, 9)
    for act in (lambda: read_range("s3://no-such-bucket/a", 0, 9), lambda: list(list_objects("s3://no-such-bucket/a"))):
        with pytest.raises(PunaError, match="the bucket s3://no-such-bucket does not exist"):
            act()


def test_an_object_shorter_than_expected_or_replaced(url, data) -> None:
    with pytest.raises(PunaError, match="has 300000 bytes, 300001 were expected"):
        read_range(url, 10, len(data) + 1)
    version = head(url).version
    assert read_range(url, 0, 9, version) == data[:9]
    write(url, data[::-1])
    with pytest.raises(PunaError, match="was replaced while it was read"):
        read_range(url, 0, 9, version)


def test_addresses() -> None:
    for bad in ("http://host/x", "s3://", "s3:///key", "file.txt", "s3://b/a//c", "s3://b/../c"):
        with pytest.raises(PunaError):
            objects.split_url(bad)
    assert objects.split_url("az://c/a/b") == ("az", "c", "a/b")


def test_list_has_folder_semantics_and_key_order(s3_bucket) -> None:
    for key in ("web/b", "web/a/z", "web/a/b", "web2/x", "web"):
        write(f"{s3_bucket}/{key}", key.encode())
    assert [i.path for i in list_objects(f"{s3_bucket}/web")] == [f"{s3_bucket}/web/{k}" for k in ("a/b", "a/z", "b")]
    assert list(list_objects(f"{s3_bucket}/web/")) == list(list_objects(f"{s3_bucket}/web"))
    assert len(list(list_objects(s3_bucket))) == 5
    assert next(list_objects(f"{s3_bucket}/web")).size == len("web/a/b")


@pytest.mark.parametrize("fault", ["503", "drop", "truncate", "short"])
def test_a_listing_goes_on_from_the_page_that_failed(s3_bucket, fault_proxy, fault, monkeypatch) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "4")
    monkeypatch.setattr(objects, "PAGE", 4)
    for number in range(10):
        write(f"{s3_bucket}/web/{number}", b"x")
    fault_proxy.script("pass", fault, "pass", fault, fault, kind="list")
    assert [info.path[-1] for info in list_objects(f"{s3_bucket}/web")] == list("0123456789")
    assert len(fault_proxy._scripts["list"]) == 0


# ---- credentials and endpoints ----


def test_no_credentials_is_said_in_seconds(url, monkeypatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    for disabled, message in (("false", f"no credentials to read {url}"), ("true", "no AWS credentials in the env")):
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", disabled)
        began = time.monotonic()
        with pytest.raises(PunaError, match=message) as caught:
            read_range(url, 0, 9)
        assert "AWS_ACCESS_KEY_ID" in caught.value.hint
        assert time.monotonic() - began < 20  # a hang would be minutes


def test_unsigned_reads_what_is_public_only(url, data, s3_server, fault_proxy, monkeypatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    with pytest.raises(PunaError, match=r"no permission to read .*\(403; unsigned, AWS_SKIP_SIGNATURE\)"):
        read_range(url, 0, 9)
    public = url.rpartition("/")[0] + "/public"
    headers = {"x-amz-acl": "public-read", "Content-Type": "application/octet-stream"}
    request = urllib.request.Request(public.replace("s3:/", s3_server), data, headers, method="PUT")
    urllib.request.urlopen(request, timeout=30).close()
    assert read_range(public, 0, 9) == data[:9]
    assert set(fault_proxy.authorizations) == {""}


@pytest.mark.parametrize("boto3", [True, False])
@pytest.mark.parametrize("profile", ["", "work"])
def test_profiles(url, data, fault_proxy, tmp_path, monkeypatch, boto3, profile) -> None:
    if boto3:
        pytest.importorskip("boto3")
    else:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.delenv(name)
    keys = "[default]\naws_access_key_id = AKIDDEFAULT\naws_secret_access_key = hidden-one\n"
    (tmp_path / "keys").write_text(f"{keys}[work]\naws_access_key_id = AKIDWORK\naws_secret_access_key = hidden-two\n")
    (tmp_path / "config").write_text("[default]\nregion = eu-west-1\n[profile work]\nregion = eu-west-3\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "keys"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    if profile:
        monkeypatch.setenv("AWS_PROFILE", profile)
    assert read_range(url, 0, 9) == data[:9]
    expected = "AKIDWORK/*/eu-west-3/s3" if profile else "AKIDDEFAULT/*/eu-west-1/s3"
    start, end = expected.split("*")
    assert f"Credential={start}" in fault_proxy.authorizations[-1]
    assert end in fault_proxy.authorizations[-1]
    fault_proxy.always("403")
    with pytest.raises(PunaError, match=f"profile {profile or 'default'} of") as caught:
        read_range(url, 0, 9)
    assert "hidden" not in caught.value.message + caught.value.hint


def test_wrong_profiles(url, tmp_path, monkeypatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_PROFILE", "absent")
    with pytest.raises(PunaError, match="AWS_PROFILE absent is in none of"):
        read_range(url, 0, 9)
    (tmp_path / "keys").write_text("aws_secret_access_key = hidden-one\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "keys"))
    with pytest.raises(PunaError, match="not a readable AWS settings file") as caught:
        read_range(url, 0, 9)
    assert "hidden-one" not in str(caught.value)


def test_the_endpoint_for_s3_comes_first(url, data, s3_server, fault_proxy, monkeypatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_server)
    assert read_range(url, 0, 9) == data[:9]
    assert not fault_proxy.gets
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", fault_proxy.url)
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    assert read_range(url, 0, 9) == data[:9]
    assert sum(fault_proxy.gets.values()) == 1


def test_foreign_text_is_cleaned(monkeypatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token-of-the-session")
    text = f"GET http://h/k?X-Amz-Signature=abcdef failed {SECRET} token-of-the-session\nDebug source: much"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    assert credentials.clean(text) == "GET http://h/k failed *** ***"


def test_a_wrong_time_out(url, monkeypatch) -> None:
    monkeypatch.setenv("PUNA_STORE_TIMEOUT", "soon")
    with pytest.raises(PunaError, match="PUNA_STORE_TIMEOUT is 'soon'"):
        read_range(url, 0, 9)


FORK = """
import os, sys
from puna.base.console import PunaError
from puna.base.objects import head
assert head(sys.argv[1]).size == 300000
if os.fork() == 0:
    try:
        head(sys.argv[1])
    except PunaError as error:
        print(error.message, "|", error.hint, flush=True)
    os._exit(0)
os.wait()
"""


def test_a_forked_child_is_told_instead_of_hanging(url) -> None:
    run = subprocess.run([sys.executable, "-c", FORK, url], capture_output=True, text=True, timeout=60)
    assert "was forked from" in run.stdout, run.stderr
    assert "spawn" in run.stdout


def test_importing_it_imports_no_torch() -> None:
    code = "import sys, puna.base.cache; assert 'torch' not in sys.modules and 'boto3' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_file_is_put_in_parts_that_together_are_it(s3_bucket, tmp_path, fault_proxy, monkeypatch) -> None:
    """Above one part's size as a multipart upload, of as many parts as a store takes; a fault is mended."""
    monkeypatch.setattr(objects, "UPLOAD_PART", 5 << 20)
    monkeypatch.setattr(objects, "MAX_PARTS", 2)
    path = tmp_path / "x.bin"
    for size in (0, 1000, (5 << 20) + 1, 17 << 20):
        path.write_bytes(random.Random(size).randbytes(size))
        fault_proxy.script("503", kind="put")
        upload(f"{s3_bucket}/deep/x", path)
        assert head(f"{s3_bucket}/deep/x").size == size
        assert read_range(f"{s3_bucket}/deep/x", 0, size) == path.read_bytes()
    fault_proxy.always("drop", kind="put")
    path.write_bytes(b"other")
    with pytest.raises(PunaError, match="did not answer after 6 tries"):
        upload(f"{s3_bucket}/deep/x", path)
    fault_proxy.calm()
    assert head(f"{s3_bucket}/deep/x").size == 17 << 20  # whole or absent: the old one is still there


def test_removing_many_objects(s3_bucket, monkeypatch) -> None:
    monkeypatch.setattr(objects, "PAGE", 4)
    urls = [f"{s3_bucket}/many/{i:02d}" for i in range(11)]
    for url in urls:
        write(url, b"x")
    remove([*urls[:9], f"{s3_bucket}/many/absent"])
    assert [info.path for info in list_objects(f"{s3_bucket}/many")] == urls[9:]


def test_stores_that_complain_of_absent_objects(monkeypatch) -> None:
    """Google's and Azure's stores refuse a bulk of which one is absent: the others go all the same."""
    held = {"a", "c", "d"}

    def delete(_store, keys) -> None:
        if absent := set(keys) - held:
            raise FileNotFoundError(absent)
        held.difference_update(keys)

    monkeypatch.setattr(objects.obstore, "delete", delete)
    remove([f"gs://bucket/{key}" for key in "abcde"])
    assert held == set()
