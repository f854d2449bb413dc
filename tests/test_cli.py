"""The command line: as a process, through a pseudo-terminal, in pipes, and with wrong input."""
import inspect
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from command_line import minigpt as in_process
from command_line import one_line

import minigpt
from minigpt.engine import cli, keyboard, terminal, transcripts
from minigpt.engine.sessions import as_source
from minigpt.engine.tokenizer import Tokenizer
from minigpt.chat import ChatSession
from minigpt.gpt2 import GPT2, GPT2Config

ROOT = Path(__file__).resolve().parent.parent
MINIGPT = [sys.executable, "-m", "minigpt"]
MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
windows = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals of this kind")


def environment(**more: str) -> dict[str, str]:
    drop = {"MINIGPT_DEBUG", "PYTHONIOENCODING", "PYTHONUTF8"}
    return {k: v for k, v in os.environ.items() if k not in drop} | {"PYTHONPATH": str(ROOT)} | more


def run(*arguments: str, given: bytes = b"", **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([*MINIGPT, *arguments], input=given, capture_output=True, env=environment(**env), timeout=300)


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory) -> Path:
    """A random model with the shipped vocabulary, saved: loads at once and talks nonsense."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("small")
    config = GPT2Config.preset("nano", vocab_size=20000, block_size=256, n_layer=2, n_head=2, n_embd=32)
    GPT2(config).eval().save_pretrained(folder, Tokenizer.from_pretrained())
    return folder


@pytest.fixture(autouse=True)
def chats(tmp_path_factory, monkeypatch) -> Path:
    """Where conversations are kept: not among those of who runs the tests."""
    monkeypatch.setenv("MINIGPT_CHATS", str(tmp_path_factory.mktemp("kept") / "chats"))
    return transcripts.chats_folder()


# ------------------------------------------------------------------ as a process

def test_help_version_and_both_ways_to_start():
    done = run("--help")
    assert done.returncode == 0 and not done.stderr
    for words in ("minigpt chat", "Examples:", "--version"):
        assert words in done.stdout.decode()
    script = [sys.executable, "-c", "from minigpt.engine.cli import main; main()"]
    other = subprocess.run([*script, "--help"], capture_output=True, env=environment())
    assert other.stdout == done.stdout
    assert run("--version").stdout.decode().strip() == f"minigpt {minigpt.__version__}"
    assert b'minigpt chat "What is a whale?"' in run("chat", "--help").stdout
    assert b"minigpt ui --docs notes" in run("ui", "--help").stdout


def test_an_argument_and_a_pipe_give_the_same_plain_answer():
    session = ChatSession(seed=4)
    expected = (session.reply("What is a whale?") + "\n").encode()
    for done in (run("chat", "What is a whale?", "--seed", "4"),
                 run("chat", "--seed", "4", given="\ufeffWhat is a whale?\r\n".encode())):
        assert done.returncode == 0 and not done.stderr
        assert done.stdout.replace(b"\r\n", b"\n") == expected


def test_output_is_utf8_in_any_locale():
    """A question echoed back in an error line: the same bytes under an old code page."""
    for env in (dict(PYTHONIOENCODING="latin-1"), dict(LC_ALL="C")):
        done = run("chat", "hi", "--model", "größe 😀", **env)
        assert done.returncode == 2 and "größe 😀".encode() in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGPIPE convention")
def test_a_reader_that_leaves_ends_it_quietly(small_folder):
    process = subprocess.Popen([*MINIGPT, "chat", "Hello", "--model", str(small_folder), "--seed", "1"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(60) in (0, 1) and err == b""


@pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
def test_ctrl_c_ends_a_single_answer_with_130():
    process = subprocess.Popen([*MINIGPT, "chat", "Tell me a story about a fox.", "--temperature", "0",
                                "--repetition-penalty", "1", "--max-new-tokens", "900"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    assert process.stdout.read(5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in err


# ------------------------------------------------------------------ one rule for all errors

BAD = [
    (["chat", "Hi", "--temperature", "-1"], "temperature=-1"),
    (["chat", "Hi", "--top-p", "1.5"], "top_p=1.5"),
    (["chat", "Hi", "--top-p", "nan"], "top_p=nan"),
    (["chat", "Hi", "--top-k", "-3"], "top_k=-3"),
    (["chat", "Hi", "--repetition-penalty", "0"], "repetition_penalty=0"),
    (["chat", "Hi", "--max-new-tokens", "0"], "max_new_tokens=0"),
    (["chat", "Hi", "--seed", "one"], "'--seed': "),
    (["chat", "Hi", "--model", "no-such-model"], "no-such-model"),
    (["chat", "Hi", "--model", "no-such/hub-name"], "no-such/hub-name"),
    (["chat", ""], "the message '' is empty"),
    (["chat", "  "], "is empty"),
    (["chat", "caf\udce9"], "half a character"),
    (["chat", "Hi", "--system", "caf\udce9"], "the system text holds '\\udce9', half a character"),
    (["chat", "Hi", "--system", "word " * 1200], "the system text needs 1212 tokens"),
    (["chat", "Hi", "--model", ""], "'--model': it is empty"),
    (["chat", "Hi", "--docs", ""], "'--docs': it is empty"),
    (["train", "--text", ""], "'--text': it is empty"),
    (["export", ""], "it is empty"),
    (["exam", ""], "it is empty"),
    (["exam", "no-such-file.py"], "no such file: "),
    (["plan", "--batch", "0"], "--batch"),
    (["plan", "--block-size", "0"], "--block-size"),
    (["plan", "--tokens", "nan"], "'--tokens': nan is no number"),
    (["plan", "--tokens", "-5"], "'--tokens': -5 must be over 0"),
    (["plan", "--price", "-3"], "'--price': -3 must be 0 or more"),
    (["generate", "Hi", "--length-penalty", "nan"], "'--length-penalty': nan is no number"),
    (["finetune", "gpt2", "--epochs", "0"], "'--epochs': 0 must be over 0"),
    (["finetune", "gpt2", "--limit", "0"], "--limit"),
    (["ui", "--host", "not.a.host.invalid"], "not.a.host.invalid"),
    (["chat", "Hi", "--adapter", "no-such-adapter"], "'no-such-adapter'"),
    (["chat", "Hi", "--docs", "no-such-docs"], "no-such-docs"),
    (["ui", "--adapter", "no-such-adapter"], "'no-such-adapter'"),
    (["ui", "--votes", "no-such-folder/votes"], "'no-such-folder/votes'"),
    (["ui", "--port", "99999"], "--port"),
    (["ui", "--visitors", "0"], "--visitors"),
    (["ui", "--model", "no-such-model"], "no-such-model"),
    (["chat", "--tempo", "1"], "--tempo"),
    (["sing"], "sing"),
]


@pytest.mark.parametrize("arguments, names", BAD, ids=[" ".join(a).encode("ascii", "replace").decode()[:60] for a, _ in BAD])
def test_bad_input_is_one_line_and_code_2(arguments, names):
    assert names in one_line(*arguments)


@pytest.mark.parametrize("given, names", [
    (b"", "the message '' is empty"), (b"\n \n", "is empty"), (b"caf\xe9", "not UTF-8 (byte 0xe9)"),
    (b"word " * 5000, "5009 tokens")], ids=["nothing", "blank", "latin-1", "too long"])
def test_bad_pipes_are_one_line_and_code_2(given, names):
    assert names in one_line("chat", given=given)


def broken(folder: Path, how: str) -> str:
    """Break a saved model in one way; what the error must name."""
    weights, config = folder / "model.safetensors", folder / "config.json"
    if how == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-5000])
        return "model.safetensors"
    if how == "empty weights":
        weights.write_bytes(b"")
        return "model.safetensors"
    if how == "no weights":
        weights.unlink()
        return folder.name
    if how == "no config":
        config.unlink()
        return "config.json"
    if how == "config is no json":
        config.write_text("{", encoding="utf-8")
        return "config.json"
    if how == "other vocabulary":
        Tokenizer.from_pretrained("gpt2").save_pretrained(folder, overwrite=True)
        return "50257"
    (folder / "tokenizer.json").unlink()
    return "tokenizer"


@pytest.mark.parametrize("how", ["truncated weights", "empty weights", "no weights", "no config", "config is no json",
                                 "other vocabulary", "no tokenizer"])
def test_broken_model_folders_are_one_line_and_code_2(how, small_folder, tmp_path):
    folder = tmp_path / "model folder"
    folder.mkdir()
    for file in small_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    names = broken(folder, how)
    assert names in one_line("chat", "Hi", "--model", folder)


def test_a_bug_shows_its_traceback(small_folder, monkeypatch):
    """What torch raises is not meant for the user, whatever its kind."""
    monkeypatch.setattr(ChatSession, "reply", None)
    monkeypatch.setattr(ChatSession, "stream", lambda *_: torch.distributions.Normal(torch.tensor(float("nan")), 1.0, True))
    with pytest.raises(ValueError, match="parameter loc"):
        in_process("chat", "Hi", "--model", small_folder)


def test_a_bug_of_a_process_ends_with_1():
    code = ("import sys, minigpt.engine.turns; from minigpt.engine.cli import main\n"
            "minigpt.engine.turns.check_text = lambda text: text.nothing\nsys.argv = ['minigpt', 'chat', 'Hi']\nmain()")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment())
    assert done.returncode == 1 and b"Traceback" in done.stderr and b"AttributeError" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="a shell closes standard input")
@pytest.mark.parametrize("command", ["chat", "generate"])
def test_a_closed_standard_input_is_an_empty_prompt(command):
    done = subprocess.run(["sh", "-c", f"'{sys.executable}' -m minigpt {command} <&-"], capture_output=True, env=environment())
    assert done.returncode == 2 and b"is empty" in done.stderr and done.stderr.count(b"\n") == 1


def test_debug_shows_where_it_came_from():
    done = run("chat", "Hi", "--top-p", "7", MINIGPT_DEBUG="1")
    assert done.returncode != 0 and b"Traceback" in done.stderr and b"top_p=7" in done.stderr


def test_options_repeat_the_sessions_defaults():
    session = inspect.signature(ChatSession).parameters
    for name, parameter in inspect.signature(cli._chat).parameters.items():
        if name not in ("prompt", "adapter", "documents", "resume", "log"):
            assert parameter.default == session[name].default, name


# ------------------------------------------------------------------ files that are read and written

@pytest.fixture
def talks(tmp_path) -> Path:
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(f'{{"messages": [{{"role": "user", "content": "Is {i} a number?"}}, '
                            f'{{"role": "assistant", "content": "Yes."}}]}}\n' for i in range(5)), encoding="utf-8")
    return path


def test_conversations_need_their_flag(talks):
    assert "--chats" in one_line("data", "pack", talks, talks.with_name("a.tokens"))
    assert not list(talks.parent.glob("a.tokens*"))


@pytest.mark.parametrize("command", [["data", "pack", "FILE", "FILE", "--chats", "--overwrite"],
                                     ["generate", "--file", "FILE", "--out", "FILE", "--overwrite"]])
def test_what_is_read_is_not_written_over(command, talks):
    before = talks.read_bytes()
    assert "also what is read" in one_line(*[str(talks) if word == "FILE" else word for word in command])
    assert talks.read_bytes() == before and list(talks.parent.iterdir()) == [talks]


@pytest.mark.parametrize("command", [["tokenizer", "train", "no-such-source.txt"], ["export"]])
def test_a_folder_that_is_a_file_is_refused_before_any_work(command, talks):
    assert f"{talks} is a file" in one_line(*command, talks)


def test_export_takes_a_model_and_its_own_tokenizer(small_folder, tmp_path):
    import shutil
    folder = tmp_path / "mixed"
    shutil.copytree(small_folder, folder)
    Tokenizer.from_pretrained("gpt2").save_pretrained(folder, overwrite=True)
    assert "50257" in one_line("export", tmp_path / "out", "--model", folder) and not (tmp_path / "out").exists()


def test_names_of_files_do_not_steer_the_terminal(tmp_path):
    (tmp_path / "a\x1b[31m.txt").write_bytes(b"\0")
    (tmp_path / "b.txt").write_text("A whale is no fish.", encoding="utf-8")
    out, err = in_process("ask", "whale", "--docs", tmp_path, "--passages")
    assert "b.txt" in out and "skipped: " in err and "a[31m.txt" in err and "\x1b" not in err


# ------------------------------------------------------------------ an interrupted run

@pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
@pytest.mark.parametrize("command", [["train", "--text", "book.txt", "--vocab-size", "300"],
                                     ["finetune", "minigpt", "--data", "talks.jsonl", "--text", ""]])
@pytest.mark.parametrize("name, code, words", [("SIGINT", 130, b"stopped by Ctrl-C"), ("SIGTERM", 143, b"stopped by SIGTERM")])
def test_an_interrupted_run_does_not_look_finished(command, name, code, words, small_folder, talks, tmp_path):
    (tmp_path / "book.txt").write_text("\n\n".join(f"Page {i} is about {i} foxes." for i in range(400)), encoding="utf-8")
    command = [str(small_folder) if word == "minigpt" else word for word in command]
    settings = [x for s in ("max_steps=1000000", "batch_size=2", "block_size=32", "log_every=1") for x in ("--set", s)]
    process = subprocess.Popen([*MINIGPT, *command, *settings, "--out", "run"], cwd=tmp_path, env=environment(),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    log, end = tmp_path / "run" / "log.csv", time.monotonic() + 200
    try:
        while not (log.exists() and log.read_text().count("\n") > 2):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < end, "no step was logged"
            time.sleep(0.1)
        process.send_signal(getattr(signal, name))
        out, err = process.communicate(timeout=100)
    finally:
        process.kill()
    last = err.strip().splitlines()[-1]
    assert process.returncode == code and words in last and b"--resume" in last and b"Traceback" not in err
    assert b"saved in" not in out and b"nan" not in out


# ------------------------------------------------------------------ what --help says

def every_command() -> dict[str, object]:
    """Each command by its words: "chat", "data pack", ..."""
    from typer.main import get_command

    def inside(group, words):
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                yield from inside(command, [*words, name])
            else:
                yield " ".join([*words, name]), command
    return dict(inside(get_command(cli.app), []))


def test_the_commands():
    assert set(every_command()) == {"chat", "ask", "index", "serve", "ui", "generate", "train", "finetune", "eval", "lm-eval",
                                    "plan", "export", "exam", "tokenizer train", "data pack"}


@pytest.mark.parametrize("name", sorted(set(every_command()) - {"lm-eval"}))
def test_examples_can_be_typed(name, monkeypatch):
    """Each example's options and arguments are taken; no example is cut in two."""
    monkeypatch.setenv("COLUMNS", "200")
    command = every_command()[name]
    lines = re.findall(r"(?m)^ *(?:Example: )?(.*minigpt .*)$", in_process(*name.split(), "--help")[0])
    examples = [line for line in lines if f"minigpt {name}" in line and not line.lstrip().startswith("Usage")]
    assert examples
    for example in examples:
        typed = example.split(f"minigpt {name}", 1)[1].partition(" < ")[0]
        assert command.make_context(name, shlex.split(typed))


def test_no_help_imports_anything_heavy():
    code = ("import sys; from minigpt.engine.cli import main\nfor words in sys.argv[1:]:\n"
            "    sys.argv = ['minigpt', *words.split(), '--help']\n    try:\n        main()\n"
            "    except SystemExit as end:\n        assert not end.code, words\n"
            "print(sorted({'torch', 'numpy', 'gradio', 'datasets', 'matplotlib', 'fastapi', 'uvicorn'} & set(sys.modules)))")
    names = sorted(set(every_command()) - {"lm-eval"})
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, env=environment())
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stderr


# ------------------------------------------------------------------ pieces

def test_the_page_waits_in_steps(small_folder, tmp_path, monkeypatch, capfd):
    """An exception that Python raises between two steps of a thread, as it does with Ctrl-C on Windows, ends `minigpt ui`."""
    import ctypes

    from minigpt import ui
    from minigpt.engine import gradio_page
    ended: list[str] = []

    class Page:
        def launch(self, **settings):
            return None, "http://127.0.0.1:0/", None

        def close(self, verbose):
            ended.append("closed")

    def serve():
        try:
            cli._ui("127.0.0.1", 0, False, str(small_folder), [], None, tmp_path / "votes", 1)
        except KeyboardInterrupt:
            ended.append("interrupted")
    monkeypatch.setattr(ui, "gradio_app", lambda *_, **__: Page())
    monkeypatch.setattr(gradio_page, "page_style", dict)
    thread, shown = threading.Thread(target=serve, daemon=True), ""
    thread.start()
    while "Ctrl-C ends it" not in shown:
        assert thread.is_alive()
        time.sleep(0.1)
        shown += capfd.readouterr().out
    time.sleep(0.2)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(KeyboardInterrupt))
    thread.join(20)
    assert ended == ["closed", "interrupted"]


def test_ctrl_c_handler_is_put_back():
    before, calls = signal.getsignal(signal.SIGINT), []
    with terminal.stoppable(lambda: calls.append(1)):
        assert signal.getsignal(signal.SIGINT) is not before
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before and calls == [1]
    with pytest.raises(KeyboardInterrupt), terminal.stoppable(lambda: None):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_in_another_thread_ctrl_c_is_left_alone():
    handlers = []

    def work():
        with terminal.stoppable(lambda: None):
            handlers.append(signal.getsignal(signal.SIGINT))
    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [before]


@pytest.fixture
def commands(small_folder, tmp_path):
    """Commands of a session with two exchanges; `.answers` are what the user says to questions."""
    session = ChatSession(small_folder, seed=1, max_new_tokens=4)
    session.reply("One")
    session.reply("Two")
    answers: list[str] = []
    commands = terminal.Commands(session, lambda question: answers.pop(0))
    commands.answers = answers
    return commands


def test_commands(commands):
    session, help = commands._session, commands("/help")
    for name in ("help", "reset", "undo", "retry", "system", "temp", "adapter", "docs", "sources", "save", "load", "quit"):
        assert f"/{name} " in help
    assert commands("/temp") == "Temperature: 0.7" and commands("/temp 0.25") == "Temperature: 0.25"
    for bad in ("hot", "-1", "nan", "inf"):
        with pytest.raises(ValueError, match=f"temperature '{bad}'"):
            commands(f"/temp {bad}")
        assert session.temperature == 0.25
    assert commands("/system Be kind.") == "System text: Be kind." and session.system == "Be kind."
    assert commands("/system") == "System text: Be kind."
    assert commands("/system -") == "System text: none" and session.system is None
    assert commands("/undo") == "Forgotten: Two" and len(session.exchanges) == 1
    assert "".join(commands("/retry")) == session.exchanges[0][1]
    commands("/reset")
    assert session.messages == []
    for bad in ("/nope", "/", "/__init__", "/_file x", "/ help"):
        assert commands(bad).startswith("There is no command /")
    with pytest.raises(EOFError):
        commands("/quit")


def test_commands_for_adapters_and_documents(commands, small_folder, tmp_path):
    from minigpt.engine.adapters import save_adapter
    from minigpt.lora import LoraConfig, apply_lora
    model = GPT2.from_pretrained(small_folder)
    save_adapter(apply_lora(model, LoraConfig(r=2)), tmp_path / "my adapter")
    (tmp_path / "my notes").mkdir()
    (tmp_path / "my notes" / "a.md").write_text("# Harbor\n\nThe \x1b[2J ferry leaves at seven.", encoding="utf-8")
    session, plain = commands._session, commands._session.model
    assert commands("/adapter") == "Adapter: none" and commands("/docs") == "Documents: none"
    assert commands(f"/adapter {tmp_path / 'my adapter'}") == f"Adapter: {tmp_path / 'my adapter'}"
    assert commands(f"/docs {tmp_path / 'my notes'}").startswith("Documents: Index(1 passage")
    assert commands("/sources").startswith("No passages")
    session.reply("When does the ferry leave?")
    assert commands("/sources").startswith("[1] a.md, Harbor, ") and "ferry leaves at seven." in commands("/sources")
    assert "\x1b" not in commands("/sources")          # nor can a document steer the terminal
    for bad, names in (("/adapter nowhere", "'nowhere'"), ("/docs nowhere", "nowhere")):
        with pytest.raises(FileNotFoundError, match=names):
            commands(bad)
    assert session.last.hits and session.model is not plain
    commands("/docs -"), commands("/adapter -")
    assert session.source is None and session.model is plain
    session.reply("When does the ferry leave?")
    assert commands("/sources").startswith("No passages") and terminal._cited(session) == ""


def test_an_answer_in_a_pipe_names_its_sources_apart(tmp_path):
    """Standard output holds the answer alone; where it comes from goes to standard error."""
    (tmp_path / "harbor.md").write_text("# Harbor\n\nThe lighthouse was built by Ines Marlow in 1871.\n\n# Ferry\n\n"
                                        "The ferry to the island leaves every morning at seven.\n", encoding="utf-8")
    question = "When does the ferry leave?"
    out, err = in_process("chat", question, "--temperature", "0", "--docs", tmp_path)
    session = ChatSession(temperature=0, source=as_source(tmp_path))
    assert out == session.reply(question) + "\n"
    assert err == f"[1] harbor.md, Ferry, {session.last.citations[0].place}\n"


def test_save_and_load_ask_before_anything_is_lost(commands, tmp_path):
    session, path = commands._session, tmp_path / "my talk.json"
    assert commands(f"/save {path}") == f"Saved to {path}."
    old = path.read_bytes()
    session.reply("Three")
    commands.answers[:] = ["", "n", "Yes"]
    assert commands(f"/save {path}") == "Not saved." and path.read_bytes() == old
    assert commands(f"/save {path}") == "Not saved." and path.read_bytes() == old
    assert commands(f"/save {path}").startswith("Saved") and path.read_bytes() != old
    assert commands(f"/load {path}") == "Loaded 3 exchanges."      # all of it is saved: no question
    session.reply("Four")
    commands.answers[:] = ["no", "y"]
    assert commands(f"/load {path}") == "Not loaded." and len(session.exchanges) == 4
    assert commands(f"/load {path}") == "Loaded 3 exchanges." and len(session.exchanges) == 3
    for bad in ("/save", "/load"):
        with pytest.raises(ValueError, match="which file"):
            commands(bad)
    with pytest.raises(FileNotFoundError):
        commands(f"/load {tmp_path / 'none.json'}")


def test_a_system_text_that_is_too_long_is_not_taken(commands):
    session = commands._session
    commands("/system Be kind.")
    with pytest.raises(ValueError, match="the system text needs .* tokens"):
        commands("/system " + "word " * 300)
    assert session.system == "Be kind." and session.fit("Hi")


def typed(*keys):
    """What reads lines from a keyboard: each key a line, or the class of an exception."""
    waiting = iter(keys)

    def read(prompt: str) -> str:
        key = next(waiting)
        if isinstance(key, str):
            return key
        raise key
    read.left = lambda: list(waiting)
    return read


@pytest.mark.parametrize("leave", [EOFError, KeyboardInterrupt, "/quit"])
def test_an_unsaved_talk_is_left_only_twice(leave, small_folder, tmp_path, capsys):
    session = ChatSession(small_folder, seed=1, max_new_tokens=4)
    nothing_said = typed(leave, "never read")
    terminal.chat_loop(session, nothing_said)
    assert nothing_said.left() == ["never read"] and "not saved" not in capsys.readouterr().out
    twice = typed("Hi", leave, "", leave, "never read")
    terminal.chat_loop(session, twice)
    assert twice.left() == ["never read"] and capsys.readouterr().out.count("not saved: /save FILE") == 1
    goes_on = typed("Hi", leave, "One more", leave, f"/save {tmp_path / 'a.json'}", leave, "never read")
    terminal.chat_loop(session, goes_on)
    assert goes_on.left() == ["never read"] and capsys.readouterr().out.count("not saved: /save FILE") == 2


def test_a_bug_in_a_talk_shows_its_traceback_and_loses_nothing(small_folder, monkeypatch, capsys):
    session = ChatSession(small_folder, seed=1, max_new_tokens=4)
    monkeypatch.setattr(terminal.Commands, "do_temp", lambda self, text: text.nothing)
    terminal.chat_loop(session, typed("/temp 1", "/load nowhere.json", "Hi", EOFError, EOFError))
    err = capsys.readouterr().err
    assert "Traceback" in err and "AttributeError" in err and "\nminigpt: nowhere.json: No such file or directory\n" in err
    assert len(session.exchanges) == 1


def test_messages_of_several_lines():
    def reading(*lines):
        waiting = iter(lines)
        return lambda prompt: next(waiting)
    assert keyboard.read_message(reading("one")) == "one"
    assert keyboard.read_message(reading('"""a', "", 'b"""')) == "a\n\nb"
    assert keyboard.read_message(reading('"""', "a", '"""')) == "a"
    assert keyboard.read_message(reading('"""a"""')) == "a"
    assert keyboard.read_message(typed('"""a', "b", KeyboardInterrupt)) == ""      # Ctrl-C forgets the lines, and stays


# ------------------------------------------------------------------ what is kept, and gone on with

def test_a_conversation_at_the_keyboard_is_kept(small_folder, chats, tmp_path, capsys):
    """As it grows, in one file; a conversation that was forgotten or left for another one keeps its file."""
    session = ChatSession(small_folder, seed=1, max_new_tokens=4)
    commands = terminal.Commands(session, typed(), log=transcripts.ChatLog())
    assert transcripts.last_conversation() is None
    once = typed("Hi", "/help", "Bye", EOFError, "never read")
    terminal.chat_loop(session, once, commands=commands)
    said = session.messages
    assert once.left() == ["never read"] and "not saved" not in capsys.readouterr().out
    assert [transcripts.read_messages(path) for path in chats.iterdir()] == [said]
    if sys.platform != "win32":
        assert chats.stat().st_mode & 0o077 == 0               # nobody else's business
    terminal.chat_loop(session, typed("/undo", EOFError), commands=commands)
    assert transcripts.read_messages(transcripts.last_conversation()) == said[:2]
    (tmp_path / "other.json").write_text(transcripts.transcript(said), encoding="utf-8")
    terminal.chat_loop(session, typed("/reset", "New", f"/load {tmp_path / 'other.json'}", "More", EOFError), commands=commands)
    assert sorted(len(transcripts.read_messages(path)) for path in chats.iterdir()) == [2, 2, 6]


def test_what_cannot_be_kept_is_told_once(small_folder, chats, capsys):
    chats.parent.mkdir(exist_ok=True)
    chats.write_text("a file where the folder should be", encoding="utf-8")
    session = ChatSession(small_folder, seed=1, max_new_tokens=4)
    commands = terminal.Commands(session, typed(), log=transcripts.ChatLog())
    terminal.chat_loop(session, typed("Hi", "Bye", EOFError, EOFError), commands=commands)
    shown = capsys.readouterr()
    assert shown.err.count("minigpt: ") == 1 and str(chats) in shown.err and "not saved: /save FILE" in shown.out
    assert len(session.exchanges) == 2


def test_continue_goes_on_with_the_last_conversation(small_folder, chats):
    """The answer is the one that a session gives which begins with these messages; the file grows by it."""
    assert "no conversation to go on with" in one_line("chat", "Hi", "--continue")
    in_process("chat", "Hi", "--model", small_folder)
    assert not chats.exists()                                  # a single message is not kept
    said = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "One"}, {"role": "assistant", "content": "1"}]
    transcripts.ChatLog().keep(said[1:])
    transcripts.ChatLog().keep(said)
    session = ChatSession(small_folder, seed=3, max_new_tokens=5)
    session.messages = said
    flags = ["--model", small_folder, "--seed", "3", "--max-new-tokens", "5"]
    out, _ = in_process("chat", "Two", "-c", "--no-log", *flags)
    assert out == session.reply("Two") + "\n" and transcripts.read_messages(transcripts.last_conversation()) == said
    assert in_process("chat", "Two", "--continue", *flags)[0] == out
    assert transcripts.read_messages(transcripts.last_conversation()) == session.messages
    in_process("chat", "Three", "-c", "--system", "Be brief.", *flags)
    assert transcripts.read_messages(transcripts.last_conversation())[0] == {"role": "system", "content": "Be brief."}
    transcripts.last_conversation().write_text("{", encoding="utf-8")
    assert "no transcript" in one_line("chat", "Hi", "-c")


# ------------------------------------------------------------------ the keyboard and the screen

def test_tab_completes_commands_and_files(tmp_path, monkeypatch):
    names = ["save", "system", "sources", "load", "docs", "temp"]
    assert keyboard._completions("/s", names) == ["/save ", "/system ", "/sources "]
    assert keyboard._completions("/nope", names) == keyboard._completions("Tell me", names) == []
    for name in ("talk one.json", "talk[2].json"):
        (tmp_path / name).touch()
    (tmp_path / "talks").mkdir()
    monkeypatch.chdir(tmp_path)
    assert keyboard._completions("/load ta", names) == ["/load talk one.json", "/load talk[2].json", f"/load talks{os.sep}"]
    assert keyboard._completions("/load talk[", names) == ["/load talk[2].json"]
    assert keyboard._completions("/temp ta", names) == []


def screen_of(pieces, **settings) -> tuple[str, str]:
    """What a terminal of 40 columns was sent, and what of it is no movement of the cursor and no colour."""
    import io

    from rich.console import Console

    from minigpt.engine.screen import show_pieces
    console = Console(file=io.StringIO(), force_terminal=True, width=40, legacy_windows=False, markup=False, **settings)
    show_pieces(console, pieces)
    sent = console.file.getvalue()
    return sent, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sent)


def test_markdown_is_drawn_and_nothing_of_a_text_is_lost():
    text = ("A **bold** word [red]and[/red] no tag.\n\nRoses are red,\nviolets <i>are</i> blue.\n\n```python\nx = 1\n\n"
            "y = 2\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n<div>\nHTML\n</div>\n\n[a link](http://example.com/x)\n")
    pieces = [text[i:i + 7] for i in range(0, len(text), 7)]
    _, seen = screen_of(pieces, color_system=None)
    lines = [line[10:].rstrip() for line in seen.splitlines()]
    for line in ("Roses are red,", "violets <i>are</i> blue.", "A bold word [red]and[/red] no"):
        assert line in lines, seen
    for part in ("x = 1", "y = 2", "<div>", "HTML", "</div>", "http://example.com/x"):
        assert part in seen
    assert "**" not in seen.replace("**bold", "") and "```" not in lines[-12:]
    assert "\x1b]8" not in screen_of(pieces)[0]                 # no link whose text hides where it leads


def test_an_answer_cannot_steer_a_terminal_that_draws():
    sent, _ = screen_of(["\x1b]0;evil\x07", "safe \x9b31m", "\x1b[2J"], color_system=None)
    assert "\x1b]0;" not in sent and "\x07" not in sent and "\x9b" not in sent and "\x1b[2J" not in sent and "safe" in sent


# ------------------------------------------------------------------ through a pseudo-terminal

class Terminal:
    """`minigpt chat` at the keyboard of a pseudo-terminal."""

    def __init__(self, *arguments: str):
        import pty
        self.ours, theirs = pty.openpty()
        self.process = subprocess.Popen([*MINIGPT, "chat", *arguments], stdin=theirs, stdout=theirs, stderr=theirs,
                                        env=environment(TERM="dumb"), start_new_session=True, preexec_fn=self._control)
        os.close(theirs)
        self.seen = ""
        self.raw = b""

    @staticmethod
    def _control():
        """Make the pseudo-terminal the controlling one, so that Ctrl-C is a signal."""
        import fcntl
        import termios
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def wait(self, pattern: str, seconds: float = 90) -> str:
        """What is shown up to and with `pattern`; it is taken away from `seen`."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen, re.DOTALL)):
            left = end - time.monotonic()
            assert left > 0, f"{pattern!r} did not come; seen: {self.seen!r}"
            if select.select([self.ours], [], [], left)[0]:
                try:
                    data = os.read(self.ours, 4096)
                except OSError:                        # Linux: the other end is closed
                    data = b""
                assert data, f"it ended before {pattern!r}; seen: {self.seen!r}"
                self.raw += data
                self.seen += data.decode("utf-8", "replace").replace("\r\n", "\n")
        out, self.seen = self.seen[:found.end()], self.seen[found.end():]
        return out

    def leave(self, key: str) -> int:
        """Press a key at the prompt until the program has left; its exit code.

        (A key that comes at the very moment when the prompt appears may get lost on its way into readline.)
        """
        for _ in range(3):
            time.sleep(0.5)
            self.type(key)
            end = time.monotonic() + 30                # a second Ctrl-C while Python shuts down would kill it
            while time.monotonic() < end and self.process.poll() is None:
                if select.select([self.ours], [], [], 0.1)[0]:
                    try:
                        os.read(self.ours, 4096)
                    except OSError:
                        break
            if self.process.poll() is not None:
                break
        return self.process.wait(30)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *error) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.ours)


@windows
def test_a_conversation_at_the_keyboard(tmp_path):
    path = tmp_path / "talk.json"
    with Terminal("--temperature", "0") as t:
        banner = t.wait("you     > ")
        assert f"minigpt {minigpt.__version__}" in banner and "Ctrl-C" in banner and "/help" in banner
        t.type("My name is Ada.\n")
        assert "minigpt > " in t.wait("you     > ")
        t.type("What is my name?\n")
        assert "Ada" in t.wait("you     > ")
        t.type("/temp 9x\n")
        assert "minigpt: temperature '9x'" in t.wait("you     > ")
        t.type(f"/save {path}\n")
        assert "Saved to" in t.wait("you     > ")
        t.type(f"/save {path}\n")
        t.wait(r"Overwrite it\? \[y/N\] ")
        t.type("\n")
        assert "Not saved." in t.wait("you     > ")
        t.type("\n/reset\n")
        assert "Forgotten" in t.wait("Forgotten.*you     > ")
        t.type(f"/load {path}\n")
        assert "Loaded 2 exchanges." in t.wait("you     > ")
        assert t.leave("/quit\n") == 0


@windows
def test_ctrl_c_stops_the_answer_and_then_the_program(tmp_path):
    path = tmp_path / "talk.json"
    with Terminal("--temperature", "0", "--repetition-penalty", "1", "--max-new-tokens", "900", "--no-log") as t:
        t.wait("you     > ")
        t.type("Tell me a story about a fox and a kite.\n")
        t.wait("minigpt > .{20}")
        t.type("\x03")                                 # Ctrl-C
        assert "[stopped]" in t.wait("you     > ")
        t.type(f"/save {path}\n")                      # it goes on, and what was said is kept
        t.wait("Saved to.*you     > ")
        assert '"assistant", "content": "Once' in path.read_text(encoding="utf-8")
        t.type("What is the capital of France?\n")
        assert "Paris" in t.wait("you     > ")
        time.sleep(0.5)                                # see leave()
        t.type("\x03")                                 # at the prompt, with something that is not saved
        t.wait("not saved: /save.*you     > ")
        assert t.leave("\x03") == 0                    # once more: leaves


@windows
def test_ctrl_d_leaves_and_half_characters_are_not_shown(tmp_path):
    """A model over bytes, taught to answer in emoji, in a terminal: no replacement characters anywhere."""
    torch.manual_seed(0)
    tokenizer = Tokenizer([m.encode() for m in MARKS] + [bytes([b]) for b in range(256)], [],
                             {m: i for i, m in enumerate(MARKS)})
    model = GPT2(GPT2Config.preset("nano", vocab_size=259, block_size=96, n_layer=2, n_head=2, n_embd=64))
    ids = ChatSession(model, tokenizer, max_new_tokens=1).fit("Hi")[0]
    row = torch.tensor([ids + tokenizer.encode_ordinary("Grüße 😀👍!") + [2]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        loss = torch.nn.functional.cross_entropy(model(row[:, :-1])[0, len(ids) - 1:], row[0, len(ids):])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "emoji", tokenizer)
    with Terminal("--model", str(tmp_path / "emoji"), "--temperature", "0", "--repetition-penalty", "1") as t:
        t.wait("you     > ")
        t.type("Hi\n")
        assert "minigpt > Grüße 😀👍!\n" in t.wait("you     > ")
        assert "\ufffd" not in t.raw.decode("utf-8")
        assert t.leave("\x04") == 0                    # Ctrl-D; what was said is kept
    with Terminal("--model", str(tmp_path / "emoji"), "--continue") as t:
        assert "Grüße 😀👍!\n" in t.wait("Going on with the last.*you     > Hi.*you     > ")
        t.type("/re\t")                                # Tab shows what there is
        t.wait("/reset.*/retry")
        t.type("s\t\n")
        t.wait("Forgotten")
        assert t.leave("\x04") == 0
