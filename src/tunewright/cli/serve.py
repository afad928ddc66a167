"""``serve``, ``deploy`` and releases: the server, and which adapter an alias answers with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunewright.cli.app import DEPLOY, app, command, given_options, group, refuse_unused
from tunewright.cli.console import RESUMES, Session
from tunewright.cli.data_review import Import, Reviewer, annotate, chosen_action, require_terminal
from tunewright.cli.evaluate import verdict_text
from tunewright.cli.preferences import SHADOW_KEYS, Estimate, estimate_text, pair_screen, progress_text
from tunewright.core.errors import UserError
from tunewright.serving.options import (
    DeployOptions,
    ReleaseTestOptions,
    ServeOptions,
    ShadowJudgeOptions,
    ShadowPlanOptions,
    ShadowReviewOptions,
)

if TYPE_CHECKING:
    from tunewright.serving.releases import DeployResult

EXIT_CODES = {"isolated": 0, "not isolated": 3, "can't tell": 4}


@command(
    app,
    "serve",
    panel=DEPLOY,
    loads=True,
    example="tunewright serve --port 8000 --engine vllm",
    status=False,
    database=True,
    traced=False,
    options=ServeOptions,
)
def serve(
    run: Session,
    adapters: Annotated[
        list[str] | None,
        typer.Argument(
            help="Adapter names, numbers or first characters, without tenants; NAME@step-N is an earlier checkpoint.",
            show_default="all that fit the base",
        ),
    ] = None,
    options: ServeOptions = ServeOptions(),
    self_test: Annotated[
        bool,
        typer.Option(
            "--self-test",
            help="Do not serve, but test that each request is answered by its own adapter. Exit code 3: one was not; "
            "4: some adapters give the same answers and are indistinguishable.",
        ),
    ] = False,
) -> int | None:
    """Serve the base and its adapters from one copy of the base until Ctrl-C.

    With tenants, each tenant's keys reach the releases of its aliases. Without tenants, everyone on this machine
    reaches every adapter.
    """
    if self_test:
        from tunewright.gate.results import isolation_blocks

        unused = [name for name in given_options(options) if name != "--engine"]
        refuse_unused("--self-test", dict.fromkeys(unused, True))
        result = run.project.self_test(adapters or (), options)
        run.show(result.as_dict(), *isolation_blocks(result, len(result.models) - 1))
        return EXIT_CODES[result.verdict]
    service = run.project.serve(adapters or (), options)

    run.report_review_status(run.folder)

    def started(url: str) -> None:
        models = "\n".join(f"  {name}" for name in service.models)
        metrics = f"Prometheus metrics: {service.metrics_url}\n" if service.metrics_url else ""
        run.show(
            {
                "url": url,
                "models": service.models,
                "system_prompts": service.system_prompts,
                "metrics": service.metrics_url,
            },
            f"Serving at {url}/v1\n{models}\n{metrics}Ctrl-C stops the server.",
        )

    service.run(started)
    return None


Alias = Annotated[str, typer.Argument(help="Alias that tenants call.")]
Because = Annotated[str | None, typer.Option(help="Reason, stored in the release history.")]


@command(
    app,
    "deploy",
    panel=DEPLOY,
    example="tunewright deploy legal legal-4f1c02a9 --canary 10%",
    database=True,
    loads=True,
    options=DeployOptions,
)
def deploy(
    run: Session,
    alias: Alias,
    adapter: Annotated[str, typer.Argument(help="Adapter name, number or first characters.")],
    force: Annotated[
        bool, typer.Option("--force", help="Deploy whatever the verdict and the serving check; requires --because.")
    ] = False,
    options: DeployOptions = DeployOptions(),
) -> int | None:
    """Point an alias at an adapter whose verdict is ship. Running servers follow within a second.

    The isolation test runs first, with all live adapters: is each request answered by its own adapter? Exit code 3 if
    the verdict is not to ship, the test finds a wrong answer, or the serving check fails, 4 if the test can't tell; the
    alias is then unchanged. The serving check has the engine answer dev items: as the trained model does?
    """
    if force != (options.because is not None):
        where = "--force" if force else "--because"
        raise UserError("--force and --because require each other", where=where, fix="Give both or neither.")
    result = run.project.deploy(alias, adapter, options)
    if result.release is None and result.isolation is None:
        assert result.verdict is not None
        run.show(result.as_dict(), verdict_text(result.verdict), f"{alias} is unchanged.")
        return result.exit_code
    return _show(run, alias, result)


@command(
    app,
    "promote",
    panel=DEPLOY,
    example="tunewright promote legal",
    status=False,
    database=True,
    loads=True,
    options=ReleaseTestOptions,
)
def promote(run: Session, alias: Alias, options: ReleaseTestOptions = ReleaseTestOptions()) -> int | None:
    """Make an alias's candidate its live adapter, after an isolation test if these adapters have not passed one.

    The serving check runs too, unless the candidate passed it on this engine.
    """
    return _show(run, alias, run.project.promote(alias, options))


def _show(run: Session, alias: str, result: DeployResult) -> int | None:
    """Show a release, or the isolation test or the serving check that it did not pass."""
    from tunewright.gate.results import isolation_blocks, serving_blocks
    from tunewright.serving.tenants.blocks import releases_blocks

    checked = [] if result.serving is None else serving_blocks(result.serving)
    if result.release is None and result.serving is not None:
        run.show(result.as_dict(), *checked, f"{alias} is unchanged.")
        return result.exit_code
    if result.release is None:
        assert result.isolation is not None
        table = isolation_blocks(result.isolation, len(result.isolation.adapters))
        run.show(result.as_dict(), *table, f"{alias} is unchanged.")
        return result.exit_code
    # A server that was started without tenants does not share this state, so it is not counted.
    text = "No running server answers aliases: start `tunewright serve`, or restart it, once there is a tenant."
    if result.servers:
        text = f"{result.servers} running servers follow." if result.servers != 1 else "The running server follows."
    run.show(result.as_dict(), *checked, *releases_blocks([result.release]), text)
    return None


@command(app, "rollback", panel=DEPLOY, example="tunewright rollback legal --to 3", status=False, database=True)
def rollback(
    run: Session,
    alias: Alias,
    to: Annotated[
        int | None, typer.Option(min=1, help="Number of the release to restore.", show_default="the previous one")
    ] = None,
) -> None:
    """Drop an alias's candidate or, if it has none, restore an earlier release."""
    from tunewright.serving.tenants.blocks import releases_blocks

    made = run.project.rollback(alias, to)
    run.show(made.as_dict(), *releases_blocks([made]))


@command(
    app, "undeploy", panel=DEPLOY, example="tunewright undeploy legal --because mistyped", status=False, database=True
)
def undeploy(run: Session, alias: Alias, because: Because = None) -> None:
    """Stop answering on an alias, as if it did not exist. `rollback` or `deploy` restores it."""
    from tunewright.serving.tenants.blocks import releases_blocks

    made = run.project.undeploy(alias, because=because)
    run.show(made.as_dict(), *releases_blocks([made]))


shadow_app = group("shadow", DEPLOY, "Plan a shadow, and show its answers. Experimental.")


@command(shadow_app, "show", example="tunewright shadow show legal", status=False, database=True)
def shadow_show(run: Session, alias: Alias) -> None:
    """Compare the answers of an alias's shadow candidates with the answers that were returned. Experimental."""
    from tunewright.serving.tenants.blocks import shadow_blocks

    lines = run.project.shadow.show(alias)
    run.show({"asked": lines}, *shadow_blocks(lines))


@command(
    shadow_app,
    "plan",
    example="tunewright shadow plan legal --differs 12% --per-day 300",
    status=False,
    database=True,
    options=ShadowPlanOptions,
)
def shadow_plan(run: Session, alias: Alias, options: ShadowPlanOptions = ShadowPlanOptions()) -> None:
    """Estimate requests, labels and days until a shadow finds a difference of 3, 5 or 10 points. Experimental.

    Answers that differ need a label by a person, and equal answers need none. You may look after every request and
    stop early.
    """
    from tunewright.serving.shadow_plan import plan_blocks

    made = run.project.shadow.plan(alias, options)
    run.show(made, *plan_blocks(made))


@command(
    shadow_app,
    "review",
    example="tunewright shadow review legal --reviewer ann",
    status=False,
    database=True,
    options=ShadowReviewOptions,
)
def shadow_review(
    run: Session,
    alias: Alias,
    reviewer: Reviewer = None,
    export: Annotated[Path | None, typer.Option(help="Write the remaining pairs to a CSV file.")] = None,
    import_file: Import = None,
    options: ShadowReviewOptions = ShadowReviewOptions(),
) -> None:
    """Judge the answers of an alias's newest shadow that differ from the live answers, blind. Experimental.

    Needs recorded requests (`tenant record`). Keys: a A is better, b B is better, g both good, x neither, s skip, u
    undo, q quit. Resumes where it stopped.
    """
    chosen_action({"--export": export, "--import": import_file})
    if export is None and import_file is None:
        require_terminal("tunewright shadow review --export FILE.csv")
    blind = run.project.shadow.review(alias, options, reviewer=reviewer)
    if export is not None:
        count = blind.export_sheet(export)
        text = f"Wrote {count} pairs to {export}: fill in verdict (A, B, both, neither or skip)"
        run.show({"file": str(export), "pairs": count}, text)
        return
    if import_file is not None:
        taken = blind.import_sheet(import_file)
        run.reporter.say(f"{taken.recorded} verdicts recorded, {taken.known} known, {taken.blank} pairs without one")
    else:
        annotate(
            run, blind, lambda pair: pair_screen(pair, blind.progress, run.console.width, SHADOW_KEYS), {}, blind.next
        )
    at = blind.progress
    document = {"reviewer": blind.reviewer, "judged": at.answered, "skipped": at.skipped, "asked": at.asked}
    run.show(document, f"{progress_text(at)}. `tunewright shadow status {alias}` shows what they say.")


@command(
    shadow_app,
    "judge",
    example="tunewright shadow judge legal --contract DPA-17 --people 20%",
    kept=RESUMES,
    status=False,
    database=True,
    options=ShadowJudgeOptions,
)
def shadow_judge(
    run: Session, alias: Alias, estimate: Estimate = False, options: ShadowJudgeOptions = ShadowJudgeOptions()
) -> None:
    """Have the config's judge answer the differing pairs of an alias's newest shadow; people judge a share of them.

    Experimental. Recorded requests are sent to the judge's endpoint. The first call comes before people's first
    verdict; later calls answer the pairs that have come since. People's verdicts correct the judge's.
    """
    if estimate:
        expected = run.project.shadow.estimate_judge(alias, options)
        run.show(expected, estimate_text(expected))
        return
    found = run.project.shadow.judge(alias, options)
    run.show(found, *found.blocks)


@command(
    shadow_app,
    "status",
    example="tunewright shadow status legal",
    status=False,
    database=True,
    options=ShadowReviewOptions,
)
def shadow_status(run: Session, alias: Alias, options: ShadowReviewOptions = ShadowReviewOptions()) -> None:
    """Show what the verdicts on an alias's newest shadow say now, valid at every look. Experimental.

    The margin is that of the config at the first look. `promote` takes the finding as evidence.
    """
    found = run.project.shadow.status(alias, options)
    run.show(found, *found.blocks)


@command(app, "releases", panel=DEPLOY, example="tunewright releases legal", status=False, database=True)
def releases(
    run: Session, alias: Annotated[str | None, typer.Argument(help="Alias to list.", show_default="all")] = None
) -> None:
    """List the releases: which adapter each alias answered with, since when, and on what grounds."""
    from tunewright.serving.tenants.blocks import releases_blocks

    known = run.project.releases(alias)
    document = {"releases": [release.as_dict() for release in known]}
    run.show(document, *(releases_blocks(known) if known else ["Nothing has been released yet."]))
