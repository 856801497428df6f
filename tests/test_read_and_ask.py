"""What a model remembers of a text, kept in a file: asking about it is going on with the text."""

import jax
import numpy as np
import pytest
from test_convert import WORDS, fails, folder, run, standard_promotion  # noqa: F401
from test_generate import EXAMPLES, SOME, build, prompts_of

from infinicontext import models
from infinicontext.cli import main
from infinicontext.errors import UserError
from infinicontext.inference import memory
from infinicontext.inference.generate import Generation, generate


@pytest.mark.parametrize("name", SOME)
def test_asking_equals_going_on_with_the_text(name, tmp_path):
    """Questions of several lengths, one of a single token, branch off one memory; the memory stays as it is."""
    model = build(EXAMPLES[name])
    text, *questions = prompts_of(21, 1, 6, vocab=model.config.vocab_size)
    options = Generation(max_new_tokens=12, segment=4)
    state = memory.remember(model, text[:13], room=8 + 6 + 12, segment=5)
    state = memory.goes_on(model, state, text[13:], segment=4)
    memory.save(tmp_path / "text.mem", state, "parameters")
    again = memory.load(tmp_path / "text.mem", model, "parameters")
    jax.tree.map(np.testing.assert_array_equal, again, state)
    answers = generate(model, questions, options, read=memory.after(again))
    jax.tree.map(np.testing.assert_array_equal, again, state)
    for question, answer in zip(questions, answers, strict=True):
        whole = memory.remember(model, np.concatenate([text, question])[:-1], room=39 - 20 - len(question), segment=64)
        expected = generate(model, [question[-1:]], options, read=memory.after(whole))
        np.testing.assert_array_equal(answer.tokens, expected[0].tokens)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_branched_state_is_that_of_so_many_rows(name):
    model = models.abstract(EXAMPLES[name])
    branched = jax.eval_shape(lambda model: memory.branched(model, model.init_state(1, capacity=9), 3), model)
    assert branched == jax.eval_shape(lambda model: model.init_state(3, capacity=9), model)


def test_what_does_not_fit_or_belong(tmp_path):
    model, other = build(), build(scale=2.0)
    state = memory.remember(model, np.arange(10), room=5)
    room = int(model.room(state)[0])
    with pytest.raises(UserError, match=f"room for {room} more tokens, not for {room + 1}"):
        memory.goes_on(model, state, np.zeros(room + 1, np.int32))
    with pytest.raises(UserError, match=f"room for {room} more tokens"):
        generate(model, [np.arange(3)], Generation(max_new_tokens=room), read=memory.after(state))
    for tokens, options in (([], {}), ([1], {"room": 0})):
        with pytest.raises(UserError, match=r"nothing to read|room is 0"):
            memory.remember(model, np.array(tokens, np.int32), **options)
    path = tmp_path / "a.mem"
    memory.save(path, state, "one")
    with pytest.raises(UserError, match=r"a\.mem was read by another model"):
        memory.load(path, other, "another")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"a\.mem cannot be read"):
        memory.load(path, model, "one")
    with pytest.raises(UserError, match=r"b\.mem cannot be read"):
        memory.load(tmp_path / "b.mem", model, "one")
    with pytest.raises(UserError, match=r"cannot be written"):
        memory.save(tmp_path / "missing" / "a.mem", state, "one")


def test_commands(run, tmp_path, capsys):  # noqa: F811
    """A text in two parts, then questions; and the sentences for what is wrong."""
    arguments = lambda name, *rest: [name, *map(str, rest), "--model", str(run)]
    whole, first, second = (tmp_path / name for name in ("whole.txt", "first.txt", "second.txt"))
    words = f"{WORDS} {WORDS}".split()
    for path, part in ((whole, words), (first, words[:20]), (second, words[20:])):
        path.write_text(" ".join(part))
    main(arguments("read", whole, "--memory", tmp_path / "whole.mem", "--room", 40))
    assert f"{len(words)} tokens read" in capsys.readouterr().out
    main(arguments("read", first, "--memory", tmp_path / "parts.mem", "--room", 40 + len(words) - 20))
    main(arguments("read", second, "--memory", tmp_path / "parts.mem", "--after", tmp_path / "parts.mem"))
    capsys.readouterr()
    answers = []
    for name in ("whole", "parts"):
        main(arguments("ask", "the key is", "--memory", tmp_path / f"{name}.mem", "--max-new-tokens", 8))
        answers.append(capsys.readouterr().out)
    main(arguments("generate", whole.read_text() + " the key is", "--max-new-tokens", 8))
    assert answers == [capsys.readouterr().out] * 2
    main(arguments("ask", "the key is", "one", "--memory", tmp_path / "whole.mem", "--max-new-tokens", 8))
    assert len(capsys.readouterr().out.splitlines()) == 2
    refused = lambda *rest: fails(capsys, *arguments(*rest))
    assert "room for" in refused("ask", "the", "--memory", tmp_path / "whole.mem", "--max-new-tokens", 400)
    assert "--room is 9, but" in refused("read", whole, "--memory", tmp_path / "x", "--after", tmp_path / "whole.mem", "--room", 9)
    assert "none.txt cannot be read" in refused("read", tmp_path / "none.txt", "--memory", tmp_path / "x")
    assert "first.txt cannot be read" in refused("ask", "the", "--memory", first)
    first.write_text("")
    assert "a prompt is empty" in refused("read", first, "--memory", tmp_path / "x")
    assert not (tmp_path / "x").exists()
