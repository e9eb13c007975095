"""lm-evaluation-harness on a checkpoint, on local tasks: each answer found another way too."""

import json
from pathlib import Path

import pytest
import torch

import evaluate
from engine.generation import TokenStream
from engine.wikitext import articles
from small_models import make_checkpoint, make_checkpoint_with_background
from system.errors import UserError
from text.tokenizer import CharTokenizer

pytest.importorskip("lm_eval", reason="lm-eval is not installed")
import lm_eval_ngt

TEXT = " = One =\n\n the cat sat on the mat .\n\n = Two =\n\n a dog ran , it ran far away .\n"
TOKENIZER = CharTokenizer.train([TEXT])
CHOICES = [
    *(("the cat", [" sat", " ran away"]), ("a dog ran", [" far", " , it"])),
    *(("it", [".", "a"]), ("a cat .", [" it", "at"])),
]
WIKITEXT = "lm_eval.tasks.wikitext.preprocess_wikitext"
TASKS = {
    "pages": f"""
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: !function {WIKITEXT}.wikitext_detokenizer
process_results: !function {WIKITEXT}.process_results
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
""",
    "choices": """
output_type: multiple_choice
doc_to_text: "{{before}}"
target_delimiter: ""
doc_to_choice: "{{answers}}"
doc_to_target: "{{likelier}}"
metric_list: [{metric: acc}]
""",
    "answers": """
output_type: generate_until
doc_to_text: "{{before}}"
doc_to_target: "{{written}}"
generation_kwargs: {until: ["%s"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


def write_task(name, rows, *words):
    Path("tasks").mkdir(exist_ok=True)
    lines = "\n".join(json.dumps(row) for row in rows)
    Path(f"tasks/{name}.jsonl").write_text(lines, encoding="utf-8")
    Path(f"tasks/{name}.yaml").write_text(
        f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files: "
        f"{{test: {Path.cwd()}/tasks/{name}.jsonl}}\ntest_split: test\n"
        + (TASKS[name] % words if words else TASKS[name])
    )


def log_probability(model, text, answer):
    ids = TOKENIZER.encode(text + answer)
    logits = model(torch.tensor([ids]))[0].double().log_softmax(-1)
    first = len(TOKENIZER.encode(text))
    return sum(float(logits[n - 1, ids[n]]) for n in range(first, len(ids)))


def written(model, text, stop):
    """What greedy decoding writes, up to a stop."""
    stream = TokenStream(model)
    stream.feed(TOKENIZER.encode(text))
    answer = TOKENIZER.decode(list(stream.generate(12, temperature=0)))
    return answer.partition(stop)[0], stop in answer


@torch.no_grad()
def test_three_kinds_of_tasks(in_tmp, monkeypatch):
    """Rolling figures are those of `evaluate.py --wikitext`; every question has its right answer
    marked by another forward pass, so that the accuracy must be 1."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(in_tmp / "cache"))
    model = make_checkpoint_with_background("x.pt", tokenizer=TOKENIZER)
    write_task("pages", [{"page": page} for page in articles(TEXT)])
    rows = [{"before": before, "answers": answers} for before, answers in CHOICES]
    for row in rows:
        found = [log_probability(model, row["before"], answer) for answer in row["answers"]]
        row["likelier"] = found.index(max(found))
    write_task("choices", rows)
    stop = written(model, CHOICES[0][0], "\0")[0][3]
    rows = [{"before": b, "written": written(model, b, stop)[0]} for b, _ in CHOICES]
    write_task("answers", rows, stop)
    flags = ["--checkpoint-path", "x.pt", "--include-path", "tasks", "--json", "found.json"]
    assert lm_eval_ngt.main([*flags, "--tasks", "pages,choices,answers", "--batch-size", "2"]) == 0
    found = json.loads(Path("found.json").read_text())["results"]
    assert found["choices"]["acc,none"] == 1 and found["answers"]["exact_match,none"] == 1
    Path("wiki.test.tokens").write_text(TEXT)
    evaluate.main(["--checkpoint-path", "x.pt", "--wikitext", ".", "--json", "ours.json"])
    ours = json.loads(Path("ours.json").read_text())["by_context"][0]
    for name in ("word_perplexity", "bits_per_byte"):
        assert found["pages"][f"{name},none"] == pytest.approx(ours[name], rel=1e-3)


@pytest.mark.parametrize("pos", ["rotary", "learned"])
def test_answers_beyond_the_positions_of_vanilla(pos, in_tmp):
    """One by one in a context that slides, else together; both as the chat has it."""
    model = make_checkpoint("x.pt", TOKENIZER, model_type="vanilla", pos=pos)  # 16 positions
    harness = lm_eval_ngt.harness_class()(model, TOKENIZER, 2, 16)
    contexts = [TOKENIZER.encode(text) for text in ("the cat", "a dog r")]
    for count in (5, 30):
        found = harness._answers(contexts, {"until": [], "max_gen_toks": count})
        for context, answer in zip(contexts, found, strict=True):
            stream = TokenStream(model)
            stream.feed(context)
            assert answer == TOKENIZER.decode(list(stream.generate(count, temperature=0)))


def test_what_is_refused(in_tmp):
    make_checkpoint("x.pt", TOKENIZER, model_type="vanilla", pos="learned")
    flags = ["--checkpoint-path", "x.pt", "--tasks"]
    with pytest.raises(UserError, match="nonsense is no task"):
        lm_eval_ngt.main([*flags, "nonsense"])
    with pytest.raises(UserError, match="only 16 positions"):
        lm_eval_ngt.main([*flags, "wikitext", "--max-length", "17"])
