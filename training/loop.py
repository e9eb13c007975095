"""The training loop: step, log, evaluate, save, until the last step or a signal."""

import math
import shlex
import time

from engine.checkpoint import save_checkpoint
from system.errors import UserError, warn
from system.machine import peak_memory_bytes
from training.display import TrainingDisplay, above_the_line
from training.run_files import flag
from training.stop_request import StopRequest
from training.validation import evaluate


def loop(trainer, log, files):
    """Train until done or asked to stop; returns the exit code.

    Args:
        log: the run's `RunLog`; None on ranks but the main one.
        files: the run's `RunFiles`.
    """
    display = TrainingDisplay(
        trainer.config["max_steps"], trainer.iter, trainer.tokens_per_step, trainer.ranks.is_main
    )
    with display, StopRequest() as stop:
        run = _Loop(trainer, log, files, display, stop)
        while not run.is_done and stop.signal is None:
            loss, norm = run.step()
            run.show(loss)
            if run.is_due("eval_interval"):
                run.evaluate(norm)
            run.save_if_due()
    if not run.is_done:
        print(f"stopped at step {trainer.iter}{run.how_to_continue()}", flush=True)
        return stop.exit_code
    whole_model = trainer.weights.whole_model()  # all ranks must get here
    if log is not None:
        log.dashboard.projector(whole_model, trainer.data.tokenizer, trainer.iter)
        log.dashboard.finish(trainer.iter)
        if trainer.best_val < math.inf and files.best.exists():
            print(f"best validation loss {trainer.best_val:.4f} in {files.best}")
            command = ["python", "chat.py", *flag("--checkpoint-path", files.best)]
            print(f"chat with it: {shlex.join(command)}")
    return 0


class _Loop:
    """What the loop remembers from step to step."""

    def __init__(self, trainer, log, files, display, stop):
        self.trainer, self.log, self.files = trainer, log, files
        self.display, self.stop = display, stop
        self.saved_at = trainer.iter
        self.steps, self.seconds = 0, 0.0  # since the last evaluation
        self.save_asked = False
        self.skipped_before = 0  # steps in a row, at the last look
        self.step_seconds = 0.0  # of the last step
        self.is_sound = True  # whether the weights may be saved

    @property
    def is_done(self):
        return self.trainer.iter >= self.trainer.config["max_steps"]

    def is_due(self, interval):
        """Whether this step ends an interval (the name of a setting), or the run."""
        return self.trainer.iter % self.trainer.config[interval] == 0 or self.is_done

    def step(self):
        """One optimizer step; returns the newest loss and gradient's norm that are known."""
        started = time.perf_counter()
        loss, norm = self.trainer.step()
        self.save_asked = self.stop.agree(self.trainer.ranks)
        if self._is_read_now():
            loss, norm = self.trainer.settle()
        self.step_seconds = time.perf_counter() - started
        # training time only: evaluations and checkpoints do not count
        self.trainer.progress["wall_time"] += self.step_seconds
        self.steps, self.seconds = self.steps + 1, self.seconds + self.step_seconds
        # a step may be skipped because the weights are already damaged
        self.is_sound = self.trainer.progress["skipped_in_a_row"] == 0
        return loss, norm

    def _is_read_now(self):
        """Whether something follows that must know what came out of this step."""
        is_saved = self.save_asked or self.stop.signal is not None
        return is_saved or self.is_due("eval_interval") or self.is_due("checkpoint_interval")

    def show(self, loss):
        """Update the display; stop if too many steps were skipped."""
        self.display.step(loss, self.step_seconds)
        check_skipped(self.trainer, self.files, self.skipped_before)
        self.skipped_before = self.trainer.progress["skipped_in_a_row"]

    def evaluate(self, norm):
        """Evaluate, write the row everywhere, and keep the best checkpoint."""
        trainer = self.trainer
        row = evaluation_row(trainer, norm, self.steps, self.seconds)  # all ranks share the windows
        whole_model = trainer.weights.whole_model()
        if self.log is not None:
            self.log.evaluation(row)
            self.log.dashboard.learned(whole_model, trainer.data, trainer.iter)
        self.steps, self.seconds = 0, 0.0
        # a step's loss is that of the weights before the step: it can be finite when they are not
        self.is_sound = self.is_sound and math.isfinite(row["val_loss"])
        if self.is_sound and (row["val_loss"] < trainer.best_val or self._best_is_gone()):
            trainer.best_val = row["val_loss"]
            save(trainer, self.files, self.files.best)
        self.display.row(row)  # after saving: the output may fail
        self.save_asked |= self.stop.agree(trainer.ranks)  # an evaluation may take long

    def _best_is_gone(self):
        """Whether somebody deleted PATH_best.pt, or copied only PATH_last.pt to this machine."""
        return self.trainer.ranks.gathered(not self.files.best.exists())[0]  # as the main rank sees

    def save_if_due(self):
        """Write PATH_last.pt if it is time, somebody asked, or the run stops here."""
        trainer, last = self.trainer, self.files.last
        is_due = self.is_due("checkpoint_interval") or self.stop.signal is not None
        if (is_due or self.save_asked) and self.is_sound and trainer.is_sound():
            save(trainer, self.files, last)
            self.saved_at = trainer.iter
        if self.save_asked:
            saved = last if self.saved_at == trainer.iter else "not saved, a number is not finite"
            self.display.say(f"SIGUSR1 at step {trainer.iter}: {saved}")

    def how_to_continue(self):
        """What follows "stopped at step N": what was saved, and the command to continue."""
        last, doubt = self.files.last, ""
        if self.saved_at != self.trainer.iter:
            doubt = ", not saved because a number was not finite"
            doubt += f"; {last} is of step {self.saved_at}" if last.exists() else ""
        if not self.files.to_resume():
            return f"{doubt}; nothing was saved"
        return f"{doubt}; continue with: {self.files.resume_command()}"


def save(trainer, files, path):
    """Save a checkpoint: all ranks give their state, the main one writes it."""
    state = trainer.state()  # collective: every rank must get here
    if trainer.ranks.is_main:
        save_checkpoint(path, state)
        files.forget_earlier()


def check_skipped(trainer, files, before):
    """Warn of the first skipped step in a row.

    Args:
        before: how many in a row there were at the last look. A GPU's steps are read late, so since
            then none, one or two were read.

    Raises:
        UserError: after --max-skipped-steps of them.
    """
    in_a_row, step = trainer.progress["skipped_in_a_row"], trainer.steps_read
    if in_a_row == 0:
        return
    if before == 0:
        with above_the_line():
            warn(f"step {step - in_a_row + 1}: loss or gradient is not finite, step skipped")
    if in_a_row >= trainer.config["max_skipped_steps"]:
        kept = files.last if files.last.exists() else files.best
        where = f"{kept} is the last good checkpoint" if kept.exists() else "nothing was saved yet"
        raise UserError(
            f"loss or gradient was not finite for {in_a_row} steps in a row (--max-skipped-steps), "
            f"up to step {step} (the batch of step {step - 1} of --seed {trainer.config['seed']}); "
            f"{where}: try a lower --learning-rate"
        )


def evaluation_row(trainer, norm, steps, seconds):
    """Evaluate; returns one line of metrics.jsonl.

    Args:
        norm: of the last step's gradient.
        steps: trained since the last evaluation, in so many `seconds`.
    """
    c = trainer.config
    result = evaluate(
        trainer.raw_model,
        trainer.data,
        c["block_size"],
        c["eval_iters"],
        trainer.device,
        trainer.autocast,
        trainer.ranks,
    )
    return {
        "step": trainer.iter,
        "tokens": trainer.progress["tokens"],
        "train_loss": trainer.mean_train_loss(),
        **result,
        "tokens_per_s": steps * trainer.tokens_per_step / seconds,
        "steps_per_s": steps / seconds,
        "learning_rate": trainer.learning_rate_now(),
        "grad_norm": norm,
        "skipped_steps": trainer.progress["skipped"],
        "wall_time": trainer.progress["wall_time"],
        "peak_memory_bytes": peak_memory_bytes(trainer.device),
    }
