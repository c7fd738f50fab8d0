import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from prefvec_ray.cli import main
from prefvec_ray.common.errors import InputError
from prefvec_ray.preferences import FORMATS, TRANSCRIPT_TEMPLATE, check_splits, give_template, load_split
from prefvec_ray.tiny_world import TinyWorld, build_tokenizer

REAL = Path(__file__).parents[3] / "shared" / "data" / "preference"


def swap(row):
    return row | {"chosen": row["rejected"], "rejected": row["chosen"]}


def row(i, chosen="Like this.", rejected="Like so.", **more):
    return {"prompt": f"How {i}?", "chosen": f"{chosen} {i}", "rejected": f"{rejected} {i}", **more}


SOUND = [row(i) if i % 2 else row(i, "Like so.", "Like this.") for i in range(600)]


def check(rows, **options):
    return check_splits({"helpful": load_split(rows, **options)})


def chat(text, *before, answer="Like this.", other="Like so."):
    prompt = [*before, {"role": "user", "content": text}]
    answers = ([{"role": "assistant", "content": said}] for said in (answer, other))
    return dict(zip(("prompt", "chosen", "rejected"), (prompt, *answers), strict=True))


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(TinyWorld("micro"))


def test_sound_data_has_no_findings():
    found = check(SOUND)
    assert found.findings == []
    measured = found.preferences["helpful"]
    assert (measured.rows, measured.pairs, measured.held_out, measured.prompts) == (600, 540, 60, 600)
    assert 0.4 < measured.chosen_longer < 0.6


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([row(i, "Same.", "Same.") for i in range(400)] + SOUND[:300], {}, "400 of 700 .* identical: 400"),
        ([row(i) | {"chosen": " "} for i in range(400)] + SOUND[:300], {}, "400 of 700 rows say nothing .* empty: 400"),
        (SOUND[:100] * 3, {}, "200 of 300 pairs repeat another pair"),
        (SOUND[:300] + [swap(r) for r in SOUND[:99]], {}, "99 of 399 .* both"),
        ([r | {s: r["prompt"] + r[s] for s in ("chosen", "rejected")} for r in SOUND], {}, "600 of 600 .* the prompt"),
        (SOUND, {"test": SOUND[:50]}, "50 of 50 held-out prompts are trained on"),
        (SOUND, {"test": [r | {"prompt": r["prompt"] + " \n"} for r in SOUND[:50]]}, "50 of 50 held-out prompts"),
        ([*SOUND, {"prompt": 3}], {"collect_flaws": True}, "1 of 601 rows cannot be used; the first: .* row 601"),
    ],
)  # fmt: skip
def test_garbage_is_an_error(rows, options, words):
    errors = check(rows, **options).errors
    assert len(errors) == 1
    assert re.search(words, errors[0]), errors


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        (SOUND + [row(i, "Same.", "Same.") for i in range(60)], {}, "60 of 660 rows say nothing .* identical: 60"),
        (SOUND + SOUND[:60], {}, "60 of 660 pairs repeat"),
        (SOUND, {"test": SOUND[:4] + [row(i) for i in range(1000, 1096)]}, "4 of 100 held-out prompts are trained on"),
        ([row(i, "A much longer answer.") for i in range(600)], {}, "chosen answer is the longer one in 100%"),
        ([row(i, "No.") for i in range(600)], {}, "rejected answer is the longer one in 100%"),
        (SOUND[:90], {}, r"9 pairs held out: accuracy is known to ±0\.17 only"),
    ],
)
def test_doubts_are_warnings(rows, options, words):
    found = check(rows, **options)
    assert found.errors == []
    assert len(found.warnings) == 1
    assert re.search(words, found.warnings[0]), found.warnings


def test_bad_rows_are_left_out_up_to_a_number_and_listed():
    rows = [*SOUND, {"prompt": 3}, {"prompt": "a", "chosen": 1, "rejected": "b"}]
    with pytest.raises(InputError, match=r"row 601: field 'prompt' is 3"):
        load_split(rows)
    with pytest.raises(InputError, match=r"2 rows cannot be used, skip_bad is 1; the first: .*row 601"):
        load_split(rows, skip_bad=1)
    split = load_split(rows, skip_bad=2)
    assert len(split.train) + len(split.test) == len(SOUND)
    found = check_splits({"helpful": split})
    assert found.errors == []
    assert [re.findall(r"left out \(skip_bad\): .*row (\d+)", text) for text in found.warnings] == [["601"], ["602"]]
    assert check(rows, skip_bad=2, collect_flaws=True).errors == []
    assert "2 of 602 rows cannot be used" in check(rows, skip_bad=1, collect_flaws=True).errors[0]


def test_labels_on_one_place_are_doubted():
    responses = {"response_0": "Like this.", "response_1": "Like so."}
    rows = [{"prompt": f"How {i}?", **responses, "better_response_id": 0} for i in range(600)]
    found = check(rows, preference="helpful")
    assert found.preferences["helpful"].labels == {"response_0": 600}
    assert any("response_0 is the chosen one in 600 of 600 rows" in text for text in found.warnings)


def test_conflicts_between_preferences_are_counted_whatever_the_split():
    splits = {
        "a": load_split(SOUND),
        "half": load_split([swap(r) if i < 300 else r for i, r in enumerate(SOUND)], test_fraction=0.3),
        "copy": load_split(SOUND),
        "opposite": load_split([swap(r) for r in SOUND]),
        "other": load_split([row(i + 1000) for i in range(50)]),
    }
    found = check_splits(splits)
    counts = {overlap.preferences: (overlap.shared, overlap.opposite) for overlap in found.overlaps}
    assert counts["a", "half"] == (600, 300)
    assert counts["a", "copy"] == (600, 0)
    assert counts["a", "opposite"] == (600, 600)
    assert counts["a", "other"] == (0, 0)
    assert any("shares with copy the same way: both vectors will be the same" in text for text in found.warnings)
    assert any("a: orders all 600 pairs that it shares with opposite oppositely" in text for text in found.warnings)


def test_lengths_are_those_that_trl_trains_on(tokenizer, tmp_path):
    from trl import DPOConfig, DPOTrainer

    from prefvec_ray.tiny_world import new_model

    rows = [chat("How " + "do " * i + "I brew moon tea?", answer="Use a silver kettle.") for i in range(60)]
    split = load_split(rows, test=rows[:1])
    limit = 60
    new_model(TinyWorld("micro"), tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    lengths = check_splits({"helpful": split}, tokenizer=tokenizer, max_length=limit).preferences["helpful"].lengths
    trainer = DPOTrainer(
        model=str(tmp_path),
        args=DPOConfig(output_dir=str(tmp_path), max_length=limit, use_cpu=True, bf16=False, report_to="none"),
        train_dataset=split.train,
        processing_class=tokenizer,
    )
    kept = trainer.train_dataset
    assert lengths is not None
    assert lengths.left_out == len(rows) - len(kept) > 5
    longest = [len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in kept]
    assert lengths.truncated == lengths.left_out + sum(length > limit for length in longest) > lengths.left_out
    assert lengths.chosen["max"] == max(len(r["chosen_ids"]) for r in kept)
    assert lengths.sampled == 60


def test_what_max_length_destroys_is_told(tokenizer):
    long = [chat(f"How {i}?", answer="word " * 90 + "yes", other="word " * 90 + "no") for i in range(600)]
    found = check_splits({"helpful": load_split(long)}, tokenizer=tokenizer, max_length=64)
    assert "540 of 540 pairs have equal answers up to max_length 64" in found.errors[0]
    wide = [chat(f"How {i} " + "word " * 90) for i in range(600)]
    found = check_splits({"helpful": load_split(wide)}, tokenizer=tokenizer, max_length=64)
    assert "540 of 540 pairs are dropped: the prompt fills max_length 64" in found.errors[0]


def test_pairs_beyond_the_context_of_the_base_are_an_error(tokenizer):
    rows = [chat(f"How {i}?", answer="word " * 90 + str(i), other=f"No {i}.") for i in range(600)]
    splits = {"helpful": load_split(rows)}
    found = check_splits(splits, tokenizer=tokenizer, max_length=1024, context=64)
    (error,) = found.errors
    assert "and the base has a context of 64; set dpo.max_length to 64 or less" in error
    for limit, context in ((64, 64), (1024, 1024), (1024, None)):
        assert check_splits(splits, tokenizer=tokenizer, max_length=limit, context=context).errors == []


def test_a_chat_template_that_takes_no_system_messages_is_an_error_that_says_what_to_do(tokenizer):
    system = {"role": "system", "content": "Be kind."}
    rows = [chat(f"How {i}?", *[system] * (i % 2), answer=f"Like {i % 3}.") for i in range(600)]
    kept = check_splits({"helpful": load_split(rows)}, tokenizer=tokenizer, max_length=200)
    assert len(kept.errors) == 1
    assert "chat template refuses" in kept.errors[0]
    assert "not system" in kept.errors[0]
    assert "system: fold" in kept.errors[0]
    folded = check_splits({"helpful": load_split(rows, system="fold")}, tokenizer=tokenizer, max_length=200)
    assert folded.errors == []
    lengths = folded.preferences["helpful"].lengths
    assert lengths is not None
    assert lengths.refused == 0


def framed(tokenizer, template, **special):
    """An equal tokenizer with another template, which puts BOS before text where it has one."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    some = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", **special)
    if "bos_token" in special:
        first = (special["bos_token"], some.bos_token_id)
        backend.post_processor = processors.TemplateProcessing(single=f"{first[0]} $A", special_tokens=[first])
        some = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", **special)
    some.chat_template = template
    return some


def test_a_tokenizer_that_ends_every_text_trains_no_plain_text(tokenizer):
    some = framed(tokenizer, TRANSCRIPT_TEMPLATE)
    end = ("<|end|>", some.eos_token_id)
    some.backend_tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {end[0]}", special_tokens=[end])
    (error,) = check_splits({"helpful": load_split(SOUND)}, tokenizer=some).errors
    assert "puts its end token behind every text" in error
    assert "add_eos_token: false" in error
    rows = [chat(f"How {i}?", answer=f"Like {i % 7}.", other=f"Not {i % 5}.") for i in range(600)]
    assert check_splits({"helpful": load_split(rows)}, tokenizer=some).errors == []


def template_warnings(rows, tokenizer, **options):
    found = check_splits({"helpful": load_split(rows)}, tokenizer=tokenizer, **options)
    return [text for text in found.warnings if "template" in text]


TURNS = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + END }}{% endfor %}"
BOS = "<|user|>"  # any special token will do


@pytest.mark.parametrize(
    ("template", "special", "words"),
    [
        (TURNS.replace("END", "' '"), {}, r"540 of 540 .* have no end token after the answer \('.*'\): .* eos_token"),
        (TURNS.replace("END", "'<|pad|>'"), {}, r"540 of 540 .* end with '<\|pad\|>', which ends no answer"),
        (TURNS.replace("END", "eos_token + '\n'"), {"bos_token": BOS}, r"540 of 540 .* lack the BOS token"),
        (TURNS.replace("END", "eos_token + '\n'"), {}, None),
        ("{{ bos_token }}" + TURNS.replace("END", "eos_token"), {"bos_token": BOS}, None),
        (TRANSCRIPT_TEMPLATE, {}, None),
    ],
)
def test_special_tokens_around_conversations_are_checked(tokenizer, template, special, words):
    rows = [chat(f"How {i}?", answer=f"Like {i % 7}.", other=f"Not {i % 5}.") for i in range(600)]
    some = framed(tokenizer, template, **special)
    warnings = template_warnings(rows, some)
    assert len(warnings) == (words is not None), warnings
    if words:
        assert re.search(words, warnings[0]), warnings


def test_what_ends_an_answer_of_the_base_ends_a_conversation(tokenizer):
    rows = [chat(f"How {i}?", answer=f"Like {i % 7}.", other=f"Not {i % 5}.") for i in range(600)]
    some = framed(tokenizer, TURNS.replace("END", "'<|pad|>'"))
    ends = frozenset({some.eos_token_id, some.convert_tokens_to_ids("<|pad|>")})
    assert not template_warnings(rows, some, ends=ends)


@pytest.mark.parametrize("special", [{}, {"bos_token": BOS}])
def test_a_transcript_begins_with_bos_once_where_the_tokenizer_adds_it(tokenizer, special):
    some = framed(tokenizer, None, **special)
    give_template(some, "transcript")
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    ids = some.apply_chat_template(turns, return_dict=True)["input_ids"]
    assert ids == some("\n\nHuman: Hi\n\nAssistant: Hello<|end|>")["input_ids"]
    assert ids.count(some.convert_tokens_to_ids(BOS)) == len(special)


def test_the_tiny_world_is_sound(tokenizer):
    world = TinyWorld("micro")
    splits = {
        name: load_split(world.preference_rows("train"), test=world.preference_rows("test"), preference=name)
        for name in ("helpful", "harmless")
    }
    assert check_splits(splits, tokenizer=tokenizer, max_length=256).errors == []


def prefvec(*words):
    return CliRunner().invoke(main, ["data", *map(str, words)], env={"COLUMNS": "200"})


def test_command_tells_in_a_table_in_json_and_by_its_exit_code(tmp_path):
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(SOUND))
    bad.write_text(json.dumps(SOUND[:100] * 3))
    done = prefvec("check", good)
    assert done.exit_code == 0
    assert "trl, plain text" in done.stdout
    assert "nothing wrong found" in done.stdout
    done = prefvec("check", f"brave={bad}", good, "--json")
    assert done.exit_code == 2
    assert done.stderr == "error: brave: 200 of 300 pairs repeat another pair; remove the copies\n"
    told = json.loads(done.stdout)
    assert told["preferences"]["brave"]["duplicates"] == 200
    assert told["overlaps"] == [{"preferences": ["brave", "good"], "shared": 100, "opposite": 0}]
    assert "error: brave: 200 of 300" in " ".join(prefvec("check", f"brave={bad}").stdout.split())
    assert "give either sources of preference data or --config" in prefvec("check").stderr
    one = tmp_path / "one.json"
    one.write_text(json.dumps(SOUND[:1]))
    assert "all rows share one prompt" in prefvec("check", one).stderr


def test_command_takes_both_labels_of_data_that_has_both(tmp_path):
    TinyWorld("micro").write(tmp_path)
    done = prefvec("check", tmp_path / "preferences.jsonl", "--json")
    assert list(json.loads(done.stdout)["preferences"]) == ["helpful", "harmless"]
    assert json.loads(done.stdout)["overlaps"][0]["opposite"] > 100


def test_command_lists_the_formats():
    done = prefvec("formats")
    assert all(name in done.stdout for name in FORMATS)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real data files are not here")
def test_real_files_are_told_truly():
    splits = {
        "helpful": load_split(REAL / "pku-saferlhf-32.json", preference="helpful"),
        "harmless": load_split(REAL / "pku-saferlhf-32.json", preference="harmless"),
        "safe": load_split(REAL / "pku_seferlhf_realign_dpo_5k.json.gz"),
        "chat": load_split(REAL / "llamafactory-dpo-en-demo.json"),
    }
    found = check_splits(splits)
    assert (found.overlaps[0].shared, found.overlaps[0].opposite) == (32, 19)
    safe, talk = found.preferences["safe"], found.preferences["chat"]
    assert (safe.rows, safe.prompts, safe.duplicates, safe.contradictions) == (5135, 930, 1545, 144)
    assert (talk.format, talk.rows, talk.system_messages) == ("sharegpt", 299, 80)
    assert found.errors == []
