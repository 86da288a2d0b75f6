"""Synthesizes the stacks of one profile, and has the rules of AWS Solutions and NIST 800-53 judge them.

python -m infra.aws.app dev FOLDER      templates and `validation-report.json` into FOLDER
cdk diff -c profile=dev                 against what is deployed, through `cdk.json`

Fails if a rule is broken whose finding `acknowledgements.py` does not name.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Final

from aws_cdk import App, BootstraplessSynthesizer, Environment, Stack, Tags, Validations
from cdk_nag import AwsSolutionsChecks, NIST80053R5Checks

from infra.aws.acknowledgements import acknowledge
from infra.aws.profiles import PROFILES, Profile
from infra.aws.stacks.audit import AuditStack
from infra.aws.stacks.cluster import ClusterStack
from infra.aws.stacks.data import DataStack
from infra.aws.stacks.events import EventsStack
from infra.aws.stacks.lustre import LustreStack
from infra.aws.stacks.network import NetworkStack
from infra.aws.stacks.observability import ObservabilityStack
from infra.aws.stacks.orchestrator import OrchestratorStack
from infra.aws.stacks.registry import RegistryStack
from infra.aws.stacks.security import SecurityStack
from infra.aws.stacks.storage import StorageStack

#: Settings of CDK, the same however it is started.
_CDK: Final = Path(__file__).with_name("cdk.json")


def installation(app: App, profile: Profile) -> dict[str, str]:
    """Add the stacks of a profile to an app, each after those that it builds on.

    Returns:
        Names under which stacks export what acknowledged findings are about.
    """
    # The account is whoever's credentials deploy; the templates are the same for all.
    options = {"env": Environment(region=profile.region), "termination_protection": profile.keep_data}

    called = profile.stack_name
    security = SecurityStack(app, called("Security"), profile, **options)
    network = NetworkStack(app, called("Network"), profile, security, **options)
    storage = StorageStack(app, called("Storage"), profile, security, **options)
    AuditStack(app, called("Audit"), profile, security, storage, **options)
    lustre = LustreStack(app, called("Lustre"), profile, security, network, storage, **options)
    data = DataStack(app, called("Data"), profile, security, network, **options)
    registry = RegistryStack(app, called("Registry"), profile, security, **options)
    orchestrator = OrchestratorStack(
        app, called("Orchestrator"), profile, security, network, storage, data, registry, **options
    )
    cluster = ClusterStack(
        app, called("Cluster"), profile, security, network, storage, lustre, data, orchestrator, **options
    )
    events = EventsStack(app, called("Events"), profile, security, network, storage, orchestrator, **options)
    ObservabilityStack(
        app, called("Observability"), profile, security, lustre, data, orchestrator, cluster, events, **options
    )
    for key, value in profile.tags.items():
        Tags.of(app).add(key, value)
    shared: dict[str, tuple[Stack, str]] = {
        "ledger": (data, data.ledger.table_arn),
        "inputs": (storage, storage.inputs.bucket_arn),
        "outputs": (storage, storage.outputs.bucket_arn),
        "artifacts": (storage, storage.artifacts.bucket_arn),
    }
    return {key: stack.resolve(stack.export_value(arn))["Fn::ImportValue"] for key, (stack, arn) in shared.items()}


def main(arguments: list[str]) -> None:
    """Synthesize the profile that the arguments or the context name, `dev` else."""
    name, *folder = arguments or [""]
    context = json.loads(_CDK.read_text())["context"]
    app = App(
        outdir=folder[0] if folder else None,
        context=context,
        analytics_reporting=False,
        # Templates need nothing of CDK in the account: infra/aws/deploy.py deploys them.
        default_stack_synthesizer=BootstraplessSynthesizer(),
    )
    name = name or app.node.try_get_context("profile") or "dev"
    if name not in PROFILES:
        raise SystemExit(f"there is no profile {name!r}; there are: {', '.join(PROFILES)}")
    exports = installation(app, PROFILES[name])
    Validations.of(app).add_plugins(AwsSolutionsChecks(app), NIST80053R5Checks(app))
    acknowledge(app, exports)
    app.synth()


if __name__ == "__main__":
    main(sys.argv[1:])
