"""Write a report of runs: tables, curves and what the geometry learned.

Every number comes from the files of the runs: runs/<name>/metrics.jsonl and config.json, and for
the geometry the checkpoint that config.json names. Runs that differ only in their seed share
one line, with mean and standard deviation.
"""

from pathlib import Path

from system.cli import file_path, script_parser
from system.errors import run_script
from system.safe_text import one_line

EXAMPLES = """examples:
  python report.py --runs shakespeare_vanilla shakespeare
  python report.py --runs w3_25m --output reports/w3_25m_summary.md
  python report.py --diff shakespeare_vanilla shakespeare
  python report.py --study study --output reports/study.md
  python report.py --gpu-check gpu --output reports/gpu.md
  python report.py --runs w3_25m --reference reports/first_release.json --output reports/w3.md
"""


def main(argv=None):
    """Print the table and write the report; returns the exit code."""
    parser = script_parser(__doc__, EXAMPLES)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--runs",
        nargs="+",
        help="names of runs under runs/, or of folders of runs; one that does not exist is listed "
        "as not run",
    )
    what.add_argument(
        "--diff",
        nargs=2,
        metavar=("A", "B"),
        help="print the settings in which two runs under runs/ differ, and their last evaluations",
    )
    what.add_argument(
        "--study",
        metavar="NAME",
        help="report on the runs of run_study.sh, those below runs/NAME (needs --output)",
    )
    what.add_argument(
        "--gpu-check",
        metavar="NAME",
        help="write the page of run_gpu_check.sh from runs/NAME (needs --output)",
    )
    parser.add_argument(
        "--output",
        type=file_path,
        help="write the report to this .md file, and beside it .csv, .png and .html (default: "
        "only print a table)",
    )
    parser.add_argument(
        "--reference",
        type=file_path,
        help="a JSON file of published figures to add, marked as not measured here (default: none)",
    )
    args = parser.parse_args(argv)
    if args.output is not None and Path(args.output).suffix != ".md":
        parser.error(f"--output {args.output} must end in .md")
    if args.diff is not None:
        from reporting.differences import differences

        print(differences(*args.diff))
        return 0
    if args.runs is None:
        if args.output is None:
            flag = "--study" if args.study is not None else "--gpu-check"
            parser.error(f"{flag} needs --output, the .md file to write")
        from reporting.gpu import write_gpu_page
        from reporting.study import write_study

        if args.study is not None:
            write_study(Path(args.output), args.study)
        else:
            write_gpu_page(Path(args.output), args.gpu_check)
        print(f"wrote {args.output}")
        return 0
    from reporting.runs import find_runs, group, left_out  # PyTorch takes a second to import
    from reporting.summary import write_report
    from reporting.tables import terminal_table

    variants = group(find_runs(args.runs))
    runs = [run for v in variants for run in v.runs]
    if args.output is not None:  # before anything is printed: the output may fail
        write_report(Path(args.output), args.runs, variants, args.reference)
    print(terminal_table(variants))
    for source in dict.fromkeys(run.config["source"] for run in runs):
        print(one_line(f"text: {source}"))
    if sentence := left_out(runs, runs[0]):
        print(sentence)
    if args.output is not None:
        print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    run_script(main)
