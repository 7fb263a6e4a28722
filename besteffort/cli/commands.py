"""The stages as commands. Each imports its stage only when it is called: `--help` stays instant."""

import json
from pathlib import Path
from typing import Annotated

import typer

from besteffort.cli.console import ConsoleProgress
from besteffort.cli.options import (
    POLICY_HELP,
    Engine,
    FleetDir,
    Profile,
    Rewards,
    Seed,
    is_there,
    parse_duration_s,
    parse_engines,
    parse_key,
)
from besteffort.cli.serving import serve

DEFAULT_GPU = "titan-rtx"  # the paper's (App. A)


def register(app: typer.Typer) -> None:
    for command in (profile, score, tune, train, serve, replay, fidelity, demo, paper, doctor):
        app.command()(command)


def profile(
    fleet_dir: FleetDir,
    engine: Engine = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Instead of FLEET_DIR/profile.parquet.")
    ] = None,
    model_only: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Measure nothing: compute a profile. MODEL: roofline."),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(metavar="NAME", help=f"Whose roofline, with --model-only. [{DEFAULT_GPU}]"),
    ] = None,
    budget: Annotated[
        str, typer.Option(metavar="TIME", help="How long it may take in all, as in 90s, 5m or 1h.")
    ] = "5m",
    precision: Annotated[
        float, typer.Option(metavar="SHARE", help="Half-width of a mean's 95 % interval that is good enough.")
    ] = 0.03,
    suggest_deadline: Annotated[
        bool, typer.Option("--suggest-deadline", help="Say which deadlines leave a choice as the paper's do.")
    ] = False,
    on_this_gpu: Annotated[
        bool,
        typer.Option("--on-this-gpu", help="Into a fleet directory of its own, named after the GPU here."),
    ] = False,
) -> None:
    """Measure each model's latency on this machine: by batch size, context, prompt length, and side by side.

    A run that was cut off goes on where it stopped. It ends with a plot, and with what the figures mean
    for the deadlines.

    \b
    Example:
      besteffort profile artifacts/tiny-opt-cpu
      besteffort profile artifacts/titan-rtx-opt --model-only roofline --gpu titan-rtx
      besteffort profile artifacts/one-gpu-opt --on-this-gpu --budget 15m --suggest-deadline
    """
    from besteffort.errors import UsageError

    if (model_only is None and gpu is not None) or (model_only is not None and (engine or on_this_gpu)):
        raise UsageError("--gpu goes only with --model-only, and --engine and --on-this-gpu never do")
    if model_only is not None:
        from besteffort.stages.model_profile import model_profile

        model_profile(
            fleet_dir,
            output=output or fleet_dir / "profile.parquet",
            hardware_model=model_only,
            gpu_name=gpu or DEFAULT_GPU,
            suggest_deadline=suggest_deadline,
            progress=ConsoleProgress(),
        )
        return
    from besteffort.stages.profile import profile

    if on_this_gpu:
        from besteffort.stages.gpu_fleet import gpu_fleet

        fleet_dir = gpu_fleet(fleet_dir, ConsoleProgress())
    profile(
        fleet_dir,
        output=output or fleet_dir / "profile.parquet",
        attached=parse_engines(engine),
        budget_s=parse_duration_s("--budget", budget),
        precision=precision,
        suggest_deadline=suggest_deadline,
        progress=ConsoleProgress(),
    )


def score(
    fleet_dir: FleetDir,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Read DIR/hellaswag.jsonl, copa.jsonl, ... instead of the Hugging Face hub.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="Only the first N documents of each task. [all]")
    ] = None,
    given: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Measure nothing: take a CSV with the columns task,model,value."),
    ] = None,
    engine: Engine = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Instead of FLEET_DIR/rewards.parquet.")
    ] = None,
) -> None:
    """Measure how well each model does each task, zero-shot, with lm-eval.

    A run that was cut off goes on where it stopped.

    \b
    Example:
      besteffort score artifacts/tiny-opt-cpu --limit 100
      besteffort score artifacts/titan-rtx-opt --given artifacts/titan-rtx-opt/rewards.csv
    """
    from besteffort.stages.score import score

    score(
        fleet_dir,
        output=output or fleet_dir / "rewards.parquet",
        data_dir=data_dir,
        limit=limit,
        given=given,
        attached=parse_engines(engine),
        progress=ConsoleProgress(),
    )


def tune(
    fleet_dir: FleetDir,
    seed: Seed = 0,
    profile: Profile = None,
    rewards: Rewards = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Instead of FLEET_DIR/thresholds.parquet.")
    ] = None,
) -> None:
    """Search for the batch-size thresholds of the policy `thresholds`, in the simulator; minutes.

    \b
    Example:
      besteffort tune artifacts/tiny-opt-cpu --rewards artifacts/titan-rtx-opt/rewards.parquet
    """
    from besteffort.stages.tune import tune

    tune(fleet_dir, seed=seed, profile=profile, rewards=rewards, output=output, progress=ConsoleProgress())


def train(
    fleet_dir: FleetDir,
    recipe: Annotated[
        str, typer.Option(help="default, demo, dqn or paper: see docs/training.md.")
    ] = "default",
    seed: Seed = 0,
    init: Annotated[
        Path | None, typer.Option(metavar="POLICY", help="Fine-tune this policy instead of a fresh one.")
    ] = None,
    profile: Profile = None,
    rewards: Rewards = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Instead of FLEET_DIR/policy.safetensors.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write the policy even if it loses against a simpler one.")
    ] = False,
    deadline_margin: Annotated[
        float, typer.Option(help="Share of each deadline kept back for what the simulator does not know.")
    ] = 0.0,
    task_mix: Annotated[
        str, typer.Option(metavar="MIX", help="fleet: the shares in fleet.toml. random: any mix of tasks.")
    ] = "fleet",
    trace: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Half of the training is on pieces of it; may be repeated."),
    ] = None,
) -> None:
    """Fit a Q-network to the fleet in a simulator built on its profile and its rewards.

    \b
    Example:
      besteffort train artifacts/tiny-opt-cpu --rewards artifacts/titan-rtx-opt/rewards.parquet
      besteffort train artifacts/my-fleet --trace traces/last-week.parquet --task-mix random
      besteffort train artifacts/my-fleet --init artifacts/my-fleet/hard.safetensors -o soft.safetensors
    """
    from besteffort.cli.tables import print_gate
    from besteffort.stages.train import train

    train(
        fleet_dir,
        recipe=recipe,
        seed=seed,
        init=init,
        profile=profile,
        rewards=rewards,
        output=output,
        force=force,
        deadline_margin=deadline_margin,
        task_mix=task_mix,
        traces=trace or (),
        show=print_gate,
        progress=ConsoleProgress(),
    )


def replay(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="A Parquet file; see `besteffort trace`.")],
    fleet_dir: FleetDir,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            metavar="POLICY",
            help=f"{POLICY_HELP} With --simulate: hindsight, which knows the trace. Not with --url. "
            "With --compare several; else the last one counts.",
        ),
    ] = None,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Through the simulator, over the profile.")
    ] = False,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Through both, by each --policy, and say how far apart they are."),
    ] = False,
    url: Annotated[
        str | None, typer.Option(help="A besteffort router that runs already, and has its own policy.")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            envvar="BESTEFFORT_API_KEY",
            help="That router's. Better in the environment: others can see a command line.",
            show_envvar=True,
        ),
    ] = None,
    engine: Engine = None,
    profile: Profile = None,
    rewards: Rewards = None,
    name: Annotated[
        str | None, typer.Option(help="Of the folder in FLEET_DIR/replays, instead of one made up.")
    ] = None,
    seed: Seed = 0,
    budget_s: Annotated[
        float, typer.Option("--budget-s", min=0, metavar="S", help="Seconds that hindsight may search.")
    ] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Send a trace to the router on time, however slow the answers, and report how it fared.

    Without --simulate or --url it starts the fleet and the router, and stops them at the end.

    \b
    Example:
      besteffort trace generate stable artifacts/tiny-opt-cpu -o traces/calm.parquet --seed 1 --rate 8
      besteffort replay traces/calm.parquet artifacts/tiny-opt-cpu --policy greedy \\
        --rewards artifacts/titan-rtx-opt/rewards.parquet
    """
    from besteffort.cli.tables import print_comparison, print_fidelity, print_where
    from besteffort.errors import UsageError
    from besteffort.stages.replay import Replay, replay

    if sum([simulate, url is not None, engine is not None]) > 1 or (url and policy):
        raise UsageError("--simulate, --url and --engine exclude each other, and so do --url and --policy")
    if compare and (simulate or url):
        raise UsageError("--compare does both by itself: leave out --simulate and --url")
    policies = policy or []
    spec = Replay(
        trace=trace,
        fleet_dir=fleet_dir,
        policy=policies[-1] if policies else None,
        profile=profile or fleet_dir / "profile.parquet",
        rewards=rewards or fleet_dir / "rewards.parquet",
        simulated=simulate,
        url=url,
        api_key=parse_key("--api-key", api_key),
        attached=parse_engines(engine),
        name=name,
        seed=seed,
        budget_s=budget_s,
    )
    if compare:
        from besteffort.stages.compare import compare as compare_both

        found, folder = compare_both(spec, policies, ConsoleProgress())
        if as_json:
            typer.echo(json.dumps(found))
        else:
            print_fidelity(found)
            print_where({"Look at": folder / "comparison.html"})
        return
    summary, folder = replay(spec, ConsoleProgress())
    for error in summary["errors"]:
        typer.echo(f"{error['count']} requests failed: {error['message']}", err=True)
    if as_json:
        typer.echo(json.dumps(summary))
    else:
        print_comparison([summary])
        print_where({"Look at": folder / "report.html"})
    if not summary["answered"]:
        raise typer.Exit(1)


def fidelity(
    fleet_dir: FleetDir,
    profile: Annotated[
        Path | None,
        typer.Option(metavar="FILE", callback=is_there, help="Measure no profile: take this one."),
    ] = None,
    rewards: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            callback=is_there,
            help="For routing, instead of the paper's Table 1 (titan-rtx-opt).",
        ),
    ] = None,
    azure: Annotated[
        Path | None, typer.Option(metavar="FILE", help="AzureLLMInferenceTrace_code.csv, to replay too.")
    ] = None,
    engine: Engine = None,
    docs: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Put the table into this page as well.")
    ] = None,
    short: Annotated[
        bool, typer.Option("--short", help="One model alone and two policies: two minutes.")
    ] = False,
) -> None:
    """Hold the simulator against real vLLM, on traces that the profile has not seen; 90 minutes.

    The table is written anew after each part.

    \b
    Example:
      besteffort fidelity artifacts/tiny-opt-cpu
    """
    from besteffort.cli.tables import print_marks
    from besteffort.report.marks import Row
    from besteffort.stages.fidelity import Spec, write_table
    from besteffort.stages.fidelity import fidelity as run_fidelity

    spec = Spec(
        fleet_dir=fleet_dir,
        rewards=rewards or fleet_dir.parent / "titan-rtx-opt" / "rewards.parquet",
        profile=profile,
        azure=azure,
        short=short,
        attached=parse_engines(engine),
    )
    pages = (fleet_dir / "fidelity.md", *([docs] if docs else []))

    def note(rows: list[Row]) -> None:
        for page in pages:
            write_table(page, rows, spec)

    rows = run_fidelity(spec, note, ConsoleProgress())
    print_marks([(row.what, row.shown, row.wanted, row.reached, row.remark) for row in rows])


def demo(
    fleet_dir: FleetDir,
    rewards: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            callback=is_there,
            help="For routing, instead of the paper's Table 1 (titan-rtx-opt).",
        ),
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Evaluation files, instead of those of the hub.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Measure and train anew, whatever is there.")
    ] = False,
) -> None:
    """Run every stage once on a fleet that is started once, and compare policies on a real replay.

    \b
    Example:
      besteffort demo artifacts/tiny-opt-cpu
    """
    from besteffort.cli.tables import print_comparison, print_where
    from besteffort.stages.demo import Demo, run_demo

    progress = ConsoleProgress()
    progress.say(f"Demo on {fleet_dir}: profile, score, train, serve and replay, on real vLLM servers.")
    progress.say("It takes about 6 minutes the first time; what it measures and trains is used again.")
    spec = Demo(
        fleet_dir=fleet_dir,
        rewards=rewards or fleet_dir.parent / "titan-rtx-opt" / "rewards.parquet",
        data_dir=data_dir,
        trace=Path("traces") / f"demo-{fleet_dir.name}.parquet",
        fresh=fresh,
    )
    print_comparison(run_demo(spec, progress))
    print_where(
        {
            "Profile": spec.profile,
            **({"Accuracies": spec.measured_rewards} if spec.measured_rewards.exists() else {}),
            "Policy": spec.policy,
            "Training": spec.policy.with_suffix(".png"),
            "Trace": spec.trace,
            "Replays": fleet_dir / "replays",
            "Look at": spec.comparison / "comparison.html",
            "Type next": f".venv/bin/besteffort serve {fleet_dir} --policy {spec.policy}",
        }
    )


def paper(
    fleet_dir: Annotated[
        Path, typer.Argument(metavar="[FLEET_DIR]", help="A fleet with the paper's four tasks.")
    ] = Path("artifacts/titan-rtx-opt"),
    train: Annotated[
        bool, typer.Option("--train", help="Only train the three policies anew: FLEET_DIR/policies.")
    ] = False,
    recipe: Annotated[
        str | None, typer.Option(metavar="NAME", help="With --train, instead of train's own default.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="With --train, of the three trainings.")
    ] = None,
    docs: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write DIR/paper.md and its plots.")
    ] = None,
) -> None:
    """Run all experiments of the paper in the simulator, and set each number beside the paper's.

    \b
    Example:
      besteffort paper artifacts/titan-rtx-opt
    """
    from besteffort.cli.tables import print_where
    from besteffort.errors import UsageError
    from besteffort.stages.paper import run_paper, train_paper

    if (not train and (recipe is not None or seed is not None)) or (train and docs is not None):
        raise UsageError("--recipe and --seed go only with --train, and --docs only without it")
    if train:
        written = train_paper(fleet_dir, recipe=recipe, seed=seed or 0, progress=ConsoleProgress())
        print_where({f"Policy {path.stem}": path for path in written})
        return
    written = run_paper(fleet_dir, docs_dir=docs, progress=ConsoleProgress())
    print_where({path.name: path for path in written})


def doctor() -> None:
    """Say what is installed, what hardware is seen, and what would run.

    \b
    Example:
      besteffort doctor
    """
    from besteffort.cli.tables import print_findings
    from besteffort.stages.doctor import doctor

    print_findings(doctor())
