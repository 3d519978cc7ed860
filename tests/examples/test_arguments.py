"""The examples' command line, and a YAML file with the same options."""

import pytest

from arguments import Arguments, parse
from trl_sft import TrlArguments

TINY = {"steps": 7, "r": 4}
REAL = {"r": 16}


def read(*argv, kind=Arguments):
    return parse(kind, "an example", TINY, REAL, [*map(str, argv)])


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write


def test_a_file_stands_between_the_defaults_and_the_command_line(file):
    # 1e-3 is a string in YAML
    path = file("steps: 50\nlearning-rate: 1e-3\nbatch_size: 2\ndata:\n")
    args = read("--config", path, "--steps", "60")
    assert (args.steps, args.learning_rate, args.batch_size, args.r) == (60, 1e-3, 2, 4)
    assert args.data is None
    assert (args.config, args.tiny) == (path, True)


def test_a_model_in_the_file_has_the_defaults_of_a_real_one(file, tmp_path):
    args = read("--config", file(f"model: somewhere\ndata: {tmp_path / 'rows.jsonl'}\n"))
    assert (args.model, args.r, args.steps) == ("somewhere", 16, 7)
    assert args.data == tmp_path / "rows.jsonl"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("target_modules: [experts, q_proj]", ["experts", "q_proj"]),
        ("target_modules:\n- experts\n", ["experts"]),
        ("target_modules: all-linear", ["all-linear"]),
        ("liger: false", ["experts", "q_proj", "k_proj", "v_proj", "o_proj"]),
    ],
)
def test_a_list_in_the_file_is_a_list(text, names, file):
    args = read("--config", file(text), kind=TrlArguments)
    assert (args.target_modules, args.liger) == (names, False)
    args = read("--config", file(text), "--target_modules", "gate", kind=TrlArguments)
    assert args.target_modules == ["gate"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 3", "there are no options ['stepz']; the options are ['model', 'data'"),
        ("config: other.yaml", "there are no options ['config']"),
        ("- steps", "needs lines `option: value`"),
        ("steps: many", "argument --steps: invalid int value: 'many'"),
        ("data: [a.jsonl, b.jsonl]", "data takes one value, got ['a.jsonl', 'b.jsonl']"),
        ("steps: {a: 1}", "steps takes one value, got {'a': 1}"),
        ("model: somewhere", "--model needs --data FILE.jsonl"),
    ],
)
def test_what_a_file_cannot_say_is_refused(text, message, file, capsys):
    with pytest.raises(SystemExit):
        read("--config", file(text))
    assert message in capsys.readouterr().err
