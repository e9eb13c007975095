"""Run EleutherAI's lm-evaluation-harness on an NGT or a vanilla checkpoint.

The tasks are those of `lm-eval` (https://github.com/EleutherAI/lm-evaluation-harness), which you
install with `pip install lm-eval`. Most of them download their data.
"""

import json
from pathlib import Path

from system.cli import choose_device, file_path, script_parser, thread_count, whole
from system.errors import UserError, run_script
from system.files import write_whole
from system.threads import HELP as THREADS_HELP
from system.threads import choose_threads

EXAMPLES = """examples:
  python lm_eval_ngt.py --checkpoint-path checkpoints/b.pt_best.pt --tasks blimp,lambada_openai
  python lm_eval_ngt.py --checkpoint-path checkpoints/b.pt_best.pt --tasks wikitext --limit 20
  python lm_eval_ngt.py --checkpoint-path checkpoints/b.pt_best.pt --tasks mine --include-path t/
"""
NEW_TOKENS = 256  # of an answer, if the task does not say


def make_parser():
    """The parser of lm_eval_ngt.py."""
    parser = script_parser(__doc__, EXAMPLES)
    add = parser.add_argument
    add(
        "--checkpoint-path",
        type=file_path,
        required=True,
        help="an NGT or a vanilla checkpoint; if it does not exist, the same path with _best.pt or "
        "_last.pt is read",
    )
    add("--tasks", required=True, help="names of tasks, separated by commas")
    add(
        "--include-path",
        type=file_path,
        metavar="DIR",
        help="a directory with tasks of your own (default: only those of lm-eval)",
    )
    add("--num-fewshot", type=int, help="examples before each question (default: the task's)")
    add("--limit", type=whole, help="only so many documents per task (default: all)")
    add("--batch-size", type=whole, default=16, help="texts read at once (default: %(default)s)")
    add(
        "--max-length",
        type=whole,
        help="tokens that the model reads at once; without learned positions it may be more than "
        "it was trained with (default: the length of its training windows)",
    )
    add("--json", type=file_path, metavar="FILE", help="also write the results to this file")
    add("--device", default="auto", help="auto, cpu, cuda, ... (default: %(default)s)")
    add("--threads", type=thread_count, help=THREADS_HELP)
    return parser


def harness_class():
    """The class of models that the harness calls; it is made here because lm-eval takes seconds
    to import."""
    import torch
    import torch.nn.functional as F
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows
    from tqdm import tqdm

    from engine.generation import TokenStream, sample
    from engine.kv_cache import KVCache
    from engine.losses import start_of_text

    class HarnessModel(TemplateLM):
        """A checkpoint as the harness sees it. A line end stands for the start of a text."""

        def __init__(self, model, tokenizer, batch_size, max_length):
            super().__init__()
            self.model, self.encode, self.decode = model.eval(), tokenizer.encode, tokenizer.decode
            self.batch_size, self.max_length = batch_size, max_length
            self._device = next(model.parameters()).device
            self.line_end = start_of_text(tokenizer)

        @property
        def eot_token_id(self):
            return self.line_end

        def tok_encode(self, string, add_special_tokens=None, **_):
            return self.encode(string)

        @torch.inference_mode()
        def _loglikelihood_tokens(self, requests, disable_tqdm=False, **_):
            """`(sum of log probabilities, whether greedy decoding gives them)` per request."""
            longest = self.max_length + 1
            texts = [(context + answer)[-longest:] for _, context, answer in requests]
            found = [None] * len(requests)
            order = sorted(range(len(texts)), key=lambda n: -len(texts[n]))  # little padding
            starts = range(0, len(order), self.batch_size)
            for start in tqdm(starts, "log probabilities", disable=disable_tqdm, delay=2):
                chosen = order[start : start + self.batch_size]
                # what is padded follows the text, where no token of the text feels it
                width = len(texts[chosen[0]])
                rows = [texts[n] + [self.line_end] * (width - len(texts[n])) for n in chosen]
                logits = self.model(torch.tensor(rows, device=self._device)[:, :-1]).float()
                for n, row in zip(chosen, logits, strict=True):
                    count = min(len(requests[n][2]), len(texts[n]) - 1)
                    targets = torch.tensor(texts[n][-count:], device=self._device)
                    row = row[len(texts[n]) - 1 - count : len(texts[n]) - 1]
                    losses = F.cross_entropy(row, targets, reduction="sum")
                    found[n] = (-float(losses), bool((row.argmax(-1) == targets).all()))
            return found

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            """The log probability of each whole text, in windows that follow each other."""
            windows, owners = [], []
            for n, request in enumerate(requests):
                tokens = self.encode(request.args[0])
                for context, answer in get_rolling_token_windows(
                    tokens, self.line_end, self.max_length, context_len=1
                ):
                    # the harness gives the last token of the context as the first that is read
                    windows.append((None, context[: len(context) + 1 - len(answer)], answer))
                    owners.append(n)
            sums = [0.0] * len(requests)
            found = self._loglikelihood_tokens(windows, disable_tqdm)
            for n, (logprob, _) in zip(owners, found, strict=True):
                sums[n] += logprob
            return sums

        def generate_until(self, requests, disable_tqdm=False):
            """The continuation of each context up to the first of its stops, which is left out.

            Contexts of one length and with the same settings are read and continued together.
            """
            contexts = [self.encode(r.args[0]) or [self.line_end] for r in requests]
            groups = {}
            for n, request in enumerate(requests):
                settings = json.dumps(request.args[1], sort_keys=True, default=str)
                groups.setdefault((len(contexts[n]), settings), []).append(n)
            found = [None] * len(requests)
            with tqdm(total=len(requests), desc="answers", disable=disable_tqdm, delay=2) as bar:
                for members in groups.values():
                    for start in range(0, len(members), self.batch_size):
                        chosen = members[start : start + self.batch_size]
                        texts = [contexts[n] for n in chosen]
                        answers = self._answers(texts, requests[chosen[0]].args[1])
                        for n, answer in zip(chosen, answers, strict=True):
                            found[n] = answer
                        bar.update(len(chosen))
            return found

        @torch.inference_mode()
        def _answers(self, contexts, settings):
            """The continuations of contexts of one length."""
            until = settings.get("until") or []
            stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
            is_random = settings.get("do_sample", False)
            temperature = float(settings.get("temperature", 1.0)) if is_random else 0.0
            new_tokens = int(settings.get("max_gen_toks", NEW_TOKENS))
            limit = self.model.max_context
            if limit is not None and len(contexts[0]) + new_tokens > limit:
                return [self._sliding(text, stops, new_tokens, temperature) for text in contexts]
            cache, answers = KVCache(), [[] for _ in contexts]
            tokens = torch.tensor(contexts, device=self._device)
            for _ in range(new_tokens):
                logits = self.model(tokens, kv_cache=cache)[:, -1]
                tokens = torch.tensor([[sample(row, temperature)] for row in logits]).to(
                    logits.device
                )
                for answer, token in zip(answers, tokens[:, 0].tolist(), strict=True):
                    answer.append(token)
                if all(self._cut(answer, stops)[1] for answer in answers):
                    break
            return [self._cut(answer, stops)[0] for answer in answers]

        def _sliding(self, context, stops, new_tokens, temperature):
            """The continuation of a context that is too long to be read with it at once."""
            stream, answer = TokenStream(self.model), []
            stream.feed(context)
            for token in stream.generate(new_tokens, temperature=temperature):
                answer.append(token)
                if self._cut(answer, stops)[1]:
                    break
            return self._cut(answer, stops)[0]

        def _cut(self, answer, stops):
            """`(text up to the first stop, whether there is one)`."""
            text = self.decode(answer)
            ends = [text.index(stop) for stop in stops if stop in text]
            return (text[: min(ends)], True) if ends else (text, False)

    return HarnessModel


def load_harness_model(args):
    """The checkpoint that the flags name, as a model of the harness."""
    from engine.checkpoint import find_checkpoint, load_model
    from engine.losses import learned_limit
    from gravity.trial import computes

    path = find_checkpoint(args.checkpoint_path)
    model, tokenizer, _ = load_model(path, choose_device(args.device, computes))
    max_length = args.max_length or model.config.block_size
    if (limit := learned_limit(model)) is not None and max_length > limit:
        raise UserError(f"--max-length {max_length}: this model has only {limit} positions", 2)
    choose_threads(args.threads, model, args.batch_size * max_length)
    return harness_class()(model, tokenizer, args.batch_size, max_length)


def main(argv=None):
    """Run the tasks and print their table; returns the exit code."""
    args = make_parser().parse_args(argv)
    import torch  # noqa: F401  # without any environment, that is what is said

    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ImportError as error:
        raise UserError(f"lm-eval cannot be imported ({error}): pip install lm-eval") from None
    model = load_harness_model(args)
    tasks = TaskManager(include_path=args.include_path)
    names = [name for name in args.tasks.split(",") if name]
    if unknown := [name for name in names if not tasks.match_tasks([name])]:
        raise UserError(f"--tasks: {', '.join(unknown)} is no task that lm-eval knows", 2)
    results = simple_evaluate(
        model, tasks=names, task_manager=tasks, num_fewshot=args.num_fewshot, limit=args.limit
    )
    if args.json:  # before anything is printed: the output may fail
        kept = {name: results[name] for name in ("results", "versions", "n-samples")}
        write_whole(Path(args.json), json.dumps(kept, indent=1, default=str).encode())
    print(make_table(results))
    return 0


if __name__ == "__main__":
    run_script(main)
