"""Draws `aws/architecture.svg` from the templates, and writes the tables of `aws/security.md` and `aws/costs.md`.

python docs/make_aws_docs.py            after `python -m infra.aws.synthesis`

Speeds are those of `speed.json` and of every `speed-*.json` beside it, such as
`superres bench --model … --size … --json > docs/speed-h100.json` of a machine with that GPU.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import reduce
from html import escape
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, Final

from infra.aws.acknowledgements import FINDINGS
from infra.aws.cluster.instances import INSTANCE_TYPES, InstanceType
from infra.aws.gpus import GPUS, estimated, gpu_of
from infra.aws.prices import idle, of_video
from infra.aws.profiles import DEV, PROD
from infra.aws.synthesis import imports, kept

DOCS: Final = Path(__file__).parent
HERE: Final = DOCS / "aws"

#: The profile that is drawn: it has everything.
DRAWN: Final = PROD.name

#: What of a stack is shown, and how it is called; the rest (roles, routes, policies) is what these need.
SHOWN: Final = {
    "AWS::KMS::Key": "KMS key",
    "AWS::SNS::Topic": "SNS topic of alarms",
    "AWS::EC2::VPC": "VPC",
    "AWS::EC2::Subnet": "subnet",
    "AWS::EC2::NatGateway": "NAT gateway",
    "AWS::EC2::VPCEndpoint": "VPC endpoint",
    "AWS::EC2::SecurityGroup": "security group",
    "AWS::S3::Bucket": "S3 bucket",
    "AWS::CloudTrail::Trail": "CloudTrail with data events",
    "AWS::FSx::FileSystem": "FSx for Lustre",
    "AWS::FSx::DataRepositoryAssociation": "link to a bucket",
    "AWS::DynamoDB::Table": "DynamoDB table: job ledger",
    "AWS::RDS::DBCluster": "Aurora cluster",
    "AWS::ElastiCache::ReplicationGroup": "Valkey",
    "AWS::Backup::BackupPlan": "backup plan",
    "AWS::ECR::Repository": "ECR repository",
    "AWS::ElasticLoadBalancingV2::LoadBalancer": "internal load balancer",
    "AWS::WAFv2::WebACL": "WAF",
    "AWS::Cognito::UserPool": "Cognito user pool",
    "AWS::ECS::Service": "Fargate service",
    "Custom::PclusterCluster": "ParallelCluster",
    "AWS::Events::Rule": "EventBridge rule",
    "AWS::SQS::Queue": "SQS queue",
    "AWS::Lambda::Function": "Lambda function",
    "AWS::CodeDeploy::DeploymentGroup": "CodeDeploy canary",
    "AWS::CloudWatch::Dashboard": "CloudWatch dashboard",
    "AWS::CloudWatch::Alarm": "CloudWatch alarm",
    "AWS::Budgets::Budget": "budget",
}

#: Of boxes, and between them, in pixels.
_WIDTH: Final = 204
_GAP: Final = 56
_SPACE: Final = 26
_LINE: Final = 15


def reduced(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """The edges without those that follow from others."""

    def reached(start: str) -> set[str]:
        return edges[start] | {end for each in edges[start] for end in reached(each)}

    return {
        start: {end for end in ends if not any(end in reached(other) for other in ends - {end})}
        for start, ends in edges.items()
    }


def layers(edges: dict[str, set[str]]) -> list[list[str]]:
    """Stacks by the longest way to one that needs none; each layer in alphabetical order."""

    def depth(name: str) -> int:
        return 1 + max((depth(each) for each in edges[name]), default=-1)

    found: list[list[str]] = [[] for _ in range(1 + max(map(depth, edges)))]
    for name in sorted(edges):
        found[depth(name)].append(name)
    return found


def contents(template: dict[str, Any]) -> list[str]:
    """Lines of a box: what a stack holds."""
    counts = Counter(body["Type"] for body in template["Resources"].values())
    return [
        title if counts[kind] == 1 else f"{counts[kind]} x {title}" for kind, title in SHOWN.items() if counts[kind]
    ]


def routed(edges: dict[str, set[str]]) -> tuple[list[list[str]], dict[tuple[str, str], list[str]]]:
    """Where boxes and edges go: an edge that passes over columns gets a place in each of them, between the boxes.

    Returns:
        Columns of names, those of passing edges among them, in the order that crosses few edges; and the names along
        each edge.
    """
    columns = layers(edges)
    at = {name: index for index, column in enumerate(columns) for name in column}
    routes = {}
    for start, ends in sorted(reduced(edges).items()):
        for end in sorted(ends):
            between = [f"{start} {end} {index}" for index in range(at[start] - 1, at[end], -1)]
            for index, name in zip(range(at[start] - 1, at[end], -1), between, strict=True):
                columns[index].append(name)
            routes[start, end] = [start, *between, end]
    neighbours: dict[str, list[str]] = {name: [] for column in columns for name in column}
    for route in routes.values():
        for one, other in pairwise(route):
            neighbours[one].append(other)
            neighbours[other].append(one)
    # Each goes to the middle of its neighbours, some times over (Sugiyama, Tagawa and Toda, 1981).
    for _ in range(8):
        place = {name: (row + 0.5) / len(column) for column in columns for row, name in enumerate(column)}
        for column in columns:
            column.sort(key=lambda name: (sum(place[each] for each in neighbours[name]) / len(neighbours[name]), name))
    return columns, routes


def picture(templates: dict[str, Any]) -> str:
    """The stacks as SVG: a box each, to the right of those it builds on."""
    columns, routes = routed({name: imports(template) for name, template in templates.items()})

    def height(name: str) -> int:
        return 30 + _LINE * len(contents(templates[name])) if name in templates else 0

    tallest = max(sum(map(height, column)) + _SPACE * (len(column) - 1) for column in columns)
    left: dict[str, int] = {}
    top: dict[str, int] = {}
    for index, column in enumerate(columns):
        y = 20 + (tallest - sum(map(height, column)) - _SPACE * (len(column) - 1)) // 2
        for name in column:
            left[name], top[name] = 20 + index * (_WIDTH + _GAP), y
            y += height(name) + _SPACE
    size = f'width="{40 + len(columns) * (_WIDTH + _GAP) - _GAP}" height="{tallest + 40}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="Helvetica, Arial, sans-serif" font-size="11">',
        '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="7" refY="3" orient="auto">'
        '<path d="M0,0 L7,3 L0,6 z" fill="#555"/></marker></defs>',
        f'<rect {size} fill="#ffffff"/>',
    ]
    for route in routes.values():
        line = f"M{left[route[0]]},{top[route[0]] + height(route[0]) // 2}"
        for one, other in pairwise(route):
            y, into = top[one] + height(one) // 2, top[other] + height(other) // 2
            x, end = left[one], left[other] + _WIDTH
            line += f" C{(x + end) // 2},{y} {(x + end) // 2},{into} {end},{into}"
            if other != route[-1]:
                line += f" L{left[other]},{into}"
        parts.append(f'<path d="{line}" fill="none" stroke="#555" marker-end="url(#tip)"/>')
    for name in sorted(templates):
        x, y = left[name], top[name]
        parts.append(
            f'<rect x="{x}" y="{y}" width="{_WIDTH}" height="{height(name)}" rx="6" fill="#f2f6fb" stroke="#0072b2"/>'
            f'<text x="{x + 10}" y="{y + 18}" font-weight="bold" font-size="13">{escape(name)}</text>'
        )
        parts += [
            f'<text x="{x + 10}" y="{y + 36 + _LINE * line}">{escape(said)}</text>'
            for line, said in enumerate(contents(templates[name]))
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def findings() -> str:
    """The findings that stay, in Markdown; those of one rule and reason in one row."""
    lines = ["| Stack | Rule | Where | Why it stays |", "|---|---|---|---|"]
    rows = [(each.stack, each.rule.partition("[")[0], each.reason, each.path, each.rule) for each in FINDINGS]
    for (stack, rule, reason), group in groupby(sorted(rows), lambda row: row[:3]):
        places: dict[str, list[str]] = {}
        for *_, path, whole in group:
            found = re.findall(r"\[\w+::(.*)\]", whole)
            places.setdefault(path.removesuffix("/Resource"), []).extend(f"`{each}`" for each in found)
        where = "; ".join(f"{path}{': ' if what else ''}{', '.join(what)}" for path, what in places.items())
        lines.append(f"| {stack} | `{rule}` | {where} | {reason} |")
    return "\n".join(lines)


def floor() -> str:
    """What installations cost a month while no job runs, in Markdown."""
    lines = []
    for profile in (DEV, PROD):
        items = idle(profile)
        lines += [f"| `{profile.name}` | $ a month |", "|---|---|"]
        lines += [f"| {item.what} | {item.monthly:.0f} |" for item in items]
        lines += [f"| **together** | **{sum(item.monthly for item in items):,.0f}** |", ""]
    return "\n".join(lines).strip()


#: The instance that CPU figures are scaled to, and the GPU instance that has to beat it.
_CPU: Final = INSTANCE_TYPES["c7i.8xlarge"]
_RIVALS: Final = tuple(INSTANCE_TYPES[name] for name in ("g6.2xlarge", "g6e.2xlarge", "p5.4xlarge"))


_NO_GPUS: Final = """\
**There are no figures for GPUs yet.** The last columns below are the speed from which a GPU instance does the same for
less: put the frames per second that `superres bench` gives on such an instance beside them."""

_ON_GPUS: Final = """\
On GPUs, frames per second are those of `superres bench` on {devices}; below instances is what an hour of video costs
there, in $. **What begins with `~` is an estimate:** frames per second scaled by what is published of both GPUs, the
peak of dense `fp16` products on tensor cores or the bandwidth of memory, whichever leaves less. Nothing is estimated
for GPUs on which the kernels that were measured do not run (those before Ampere). Several GPUs of one instance count as
if they did not disturb one another, which was not measured. What is more than some 2 GB/s of results waits for them to
be [written](../speed.md#on-a-gpu), which is not in these figures.
"""


def speeds(folder: Path = DOCS) -> list[dict[str, Any]]:
    """What was measured, a row for each model, size, device and precision."""
    files = [folder / "speed.json", *sorted(folder.glob("speed-*.json"))]
    return [row for file in files for row in json.loads(file.read_text())["results"]]


def per_hour_of_video(rows: list[dict[str, Any]]) -> str:
    """What upscaling an hour of video costs on CPUs, and how fast a GPU has to be to cost less; in Markdown."""
    lines = [
        f"| Model | Source | Precision | measured frames/s | {_CPU.name}, frames/s | $ per hour of video | "
        + " | ".join(f"{gpu.name} is cheaper from" for gpu in _RIVALS)
        + " |",
        "|---" * (6 + len(_RIVALS)) + "|",
    ]
    for row in rows:
        if row["device_type"] != "cpu":
            continue
        fps = row["fps"] * _CPU.vcpus / row["threads"]
        cost = of_video(fps, _CPU.hourly_price)
        needed = [f"{fps * gpu.hourly_price / _CPU.hourly_price:,.0f} frames/s" for gpu in _RIVALS]
        lines.append(
            f"| `{row['model']}` | {row['size']} | {row['precision']} | {row['fps']:.2f} | {fps:,.0f} "
            f"| {cost:.2f} | " + " | ".join(needed) + " |"
        )
    return "\n".join(lines)


def per_hour_of_video_on_gpus(rows: list[dict[str, Any]]) -> str:
    """What upscaling an hour of video costs on instances with GPUs, or that none was measured; in Markdown.

    Raises:
        SettingsError: A GPU that was measured is not known.
    """
    measured: dict[tuple[str, str, str, str], dict[str, float]] = {}
    for row in rows:
        if row["device_type"] == "cuda":
            case = row["model"], row["size"], row["precision"], row["backend"]
            measured.setdefault(case, {})[gpu_of(row["device"]).name] = row["fps"]
    if not measured:
        return _NO_GPUS
    devices = [name for name in GPUS if any(name in found for found in measured.values())]
    instances = sorted((each for each in INSTANCE_TYPES.values() if each.gpus), key=lambda each: each.hourly_price)
    lines = [
        _ON_GPUS.format(devices=" and ".join(GPUS[name].device for name in devices)),
        "| Model | Source | Precision | "
        + " | ".join(f"{name}, frames/s" for name in devices)
        + "".join(f" | {each.name}: {each.gpus} x {each.gpu}" for each in instances)
        + " |",
        "|---" * (3 + len(devices) + len(instances)) + "|",
    ]
    for (model, size, precision, backend), found in measured.items():
        cells = [f"{found[name]:,.1f}" if name in found else "" for name in devices]
        cells += [_on_instance(each, found, precision, backend) for each in instances]
        lines.append(f"| `{model}` | {size} | {precision} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _on_instance(instance: InstanceType, measured: dict[str, float], precision: str, backend: str) -> str:
    """Dollars per hour of video, with a mark where they are estimated; nothing where they cannot be."""
    if instance.gpu in measured:
        return f"{of_video(instance.gpus * measured[instance.gpu], instance.hourly_price):.2f}"
    if precision != "fp16":
        return ""  # What is published of it is another peak.
    if backend == "cuda" and GPUS[instance.gpu].capability < (8, 0):
        return ""  # Other kernels run there.
    fps = min(estimated(fps, GPUS[name], GPUS[instance.gpu]) for name, fps in measured.items())
    return f"~{of_video(instance.gpus * fps, instance.hourly_price):.2f}"


def with_table(text: str, name: str, table: str) -> str:
    """A page with the table between its marks made anew.

    Raises:
        ValueError: The page has no such marks.
    """
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"the page has no {begin} ... {end}")
    return text[: text.index(begin) + len(begin)] + f"\n{table}\n" + text[text.index(end) :]


def pages() -> dict[Path, str]:
    """Everything that is made, by where it belongs."""
    security, costs = HERE / "security.md", HERE / "costs.md"
    rows = speeds()
    tables = {
        "floor": floor(),
        "per hour of video on GPUs": per_hour_of_video_on_gpus(rows),
        "per hour of video": per_hour_of_video(rows),
    }
    return {
        HERE / "architecture.svg": picture(kept(DRAWN)),
        security: with_table(security.read_text(), "findings", findings()),
        costs: reduce(lambda text, table: with_table(text, *table), tables.items(), costs.read_text()),
    }


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
