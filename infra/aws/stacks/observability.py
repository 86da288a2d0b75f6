"""What people see: a dashboard, alarms that say what to do, and a budget."""

from __future__ import annotations

from typing import Any, Final, get_args

from aws_cdk import Duration, Stack
from aws_cdk import aws_budgets as budgets
from aws_cdk import aws_cloudwatch as cloudwatch
from aws_cdk import aws_cloudwatch_actions as alarm_actions
from constructs import Construct

from infra.aws.profiles import NAMESPACE, Profile
from infra.aws.stacks.cluster import ClusterStack
from infra.aws.stacks.data import DataStack
from infra.aws.stacks.events import EventsStack
from infra.aws.stacks.lustre import LustreStack
from infra.aws.stacks.orchestrator import OrchestratorStack
from infra.aws.stacks.security import SecurityStack
from tasks.metrics.samples import Name

#: Minutes that a chunk may wait for a worker: a node takes some to start, and more than these means that none comes.
_WAIT_MINUTES: Final = 30

#: Hours without the end of any job: the flight check alone ends one each hour.
_SILENT_HOURS: Final = 3

#: Share of scratch below which somebody has to look.
_FREE: Final = 0.15

#: What ParallelCluster counts of nodes that do not start; after ten in a row it stops a queue (protected mode).
_NODE_ERRORS: Final = ("InstanceBootstrapTimeoutErrors", "OnNodeConfiguredDownloadErrors", "OnNodeConfiguredRunErrors")


class ObservabilityStack(Stack):
    """Dashboard, alarms, budget."""

    def __init__(
        self,
        scope: Construct,
        name: str,
        profile: Profile,
        security: SecurityStack,
        lustre: LustreStack,
        data: DataStack,
        orchestrator: OrchestratorStack,
        cluster: ClusterStack,
        events: EventsStack,
        **options: Any,
    ) -> None:
        super().__init__(scope, name, **options)
        self._topic = security.alarms
        self._tell = alarm_actions.SnsAction(security.alarms)
        free = cloudwatch.Metric(
            namespace="AWS/FSx",
            metric_name="FreeDataStorageCapacity",
            dimensions_map={"FileSystemId": lustre.file_system_id},
            statistic="Sum",  # Over the servers, each of which tells of its own once a minute.
            period=Duration.minutes(1),
        )
        age = events.queue.metric_approximate_age_of_oldest_message(period=Duration.minutes(5))
        dead = events.dead.metric_approximate_number_of_messages_visible(period=Duration.minutes(5))
        starts = cloudwatch.MathExpression(
            expression=" + ".join(f"FILL(m{index}, 0)" for index in range(len(_NODE_ERRORS) * len(cluster.names))),
            label="Nodes that did not start",
            using_metrics={
                f"m{index}": cloudwatch.Metric(
                    namespace="ParallelCluster",
                    metric_name=error,
                    dimensions_map={"ClusterName": called},
                    statistic="Sum",
                )
                for index, (called, error) in enumerate(
                    (called, error) for called in cluster.names for error in _NODE_ERRORS
                )
            },
            period=Duration.minutes(15),
        )
        healthy = orchestrator.api_targets.metrics.healthy_host_count(statistic="Minimum", period=Duration.minutes(1))
        failed = _metric("JobsFailed", "Sum", Duration.minutes(5))

        self._alarm("JobsFailed", failed, 1, "A job failed: `superres jobs` and its run say why")
        self._alarm(
            "NoJobEnds",
            _metric("JobsPublished", "SampleCount", Duration.hours(1)),
            1,
            f"No job ended for {_SILENT_HOURS} hours, not even the flight check: are jobs stuck, is the worker away?",
            below=True,
            periods=_SILENT_HOURS,
            missing=cloudwatch.TreatMissingData.BREACHING,
        )
        self._waiting_alarm()
        self._alarm(
            "UploadsWait",
            age,
            900,
            "Uploads wait for a run: see the log of the event handler",
            periods=2,
        )
        self._alarm("UploadsDead", dead, 1, "Uploads without a run: read the dead-letter queue, then redrive it")
        self._alarm(
            "ScratchFull",
            free,
            int(_FREE * profile.lustre_gib * 2**30),
            "Scratch is nearly full: `superres housekeeping`, fewer jobs at a time, or a larger file system",
            below=True,
            periods=5,
        )
        self._alarm(
            "NodesDoNotStart",
            starts,
            3,
            "Nodes do not start; after ten in a row their queue is stopped (protected mode)",
        )
        self._alarm("ApiDown", healthy, 1, "No Prefect API server is healthy", below=True, periods=3)
        for title, database in (("Prefect", data.prefect), ("Accounting", data.accounting)):
            used = database.metric("ACUUtilization", statistic="Average", period=Duration.minutes(5))
            self._alarm(f"{title}DatabaseBusy", used, 90, f"Database {title} is at its largest size", periods=3)
        self._add_dashboard(profile, [free], [age, dead], [starts], [healthy])
        self._add_budget(profile, security)

    def _alarm(
        self,
        name: str,
        metric: cloudwatch.IMetric,
        threshold: float,
        description: str,
        *,
        below: bool = False,
        periods: int = 1,
        missing: cloudwatch.TreatMissingData = cloudwatch.TreatMissingData.NOT_BREACHING,
    ) -> None:
        operators = cloudwatch.ComparisonOperator
        alarm = cloudwatch.Alarm(
            self,
            name,
            alarm_description=description,
            metric=metric,
            threshold=threshold,
            evaluation_periods=periods,
            comparison_operator=operators.LESS_THAN_THRESHOLD
            if below
            else operators.GREATER_THAN_OR_EQUAL_TO_THRESHOLD,
            treat_missing_data=missing,
        )
        alarm.add_alarm_action(self._tell)

    def _waiting_alarm(self) -> None:
        """Over all phases, models and pools: no sum of them is a metric, but a query can be an alarm."""
        name: Name = "QueueWait"
        query = f'SELECT MAX({_known(name)}) FROM "{NAMESPACE}"'
        alarm = cloudwatch.CfnAlarm(
            self,
            "ChunksWait",
            alarm_description=f"A chunk waited {_WAIT_MINUTES} minutes for a worker: do nodes start?",
            metrics=[cloudwatch.CfnAlarm.MetricDataQueryProperty(id="wait", expression=query, period=300)],
            threshold=60 * _WAIT_MINUTES,
            evaluation_periods=1,
            comparison_operator="GreaterThanOrEqualToThreshold",
            treat_missing_data="notBreaching",
        )
        alarm.alarm_actions = [self._topic.topic_arn]

    def _add_dashboard(self, profile: Profile, *operations: list[cloudwatch.IMetric]) -> None:
        hour, five = Duration.hours(1), Duration.minutes(5)
        ends = [_metric(name, "Sum", hour) for name in ("JobsPublished", "JobsFailed", "JobsCancelled")]
        cost = [_metric("Cost", "Sum", hour)]
        held = [_metric("NodeSeconds", "Sum", hour), _metric("GpuSeconds", "Sum", hour)]
        again = [_metric("Retries", "Sum", five)]
        speed = _search("FramesPerSecond", "Average")
        waits = _search("QueueWait", "Maximum")
        titles = ("Scratch, free bytes", "Uploads: oldest, dead", "Nodes that did not start", "Healthy API servers")

        def graph(title: str, metrics: list[Any]) -> cloudwatch.GraphWidget:
            return cloudwatch.GraphWidget(title=title, left=metrics, width=8)

        cloudwatch.Dashboard(
            self,
            "Dashboard",
            dashboard_name=f"superres-{profile.name}",
            widgets=[
                [graph("Jobs that ended", ends), graph("Cost, $", cost), graph("Node and GPU seconds", held)],
                [graph("Frames/s", [speed]), graph("Wait for a worker, s", [waits]), graph("Retries", again)],
                [graph(title, found) for title, found in zip(titles, operations, strict=True)],
            ],
        )

    def _add_budget(self, profile: Profile, security: SecurityStack) -> None:
        def told(kind: str, percent: int) -> budgets.CfnBudget.NotificationWithSubscribersProperty:
            return budgets.CfnBudget.NotificationWithSubscribersProperty(
                notification=budgets.CfnBudget.NotificationProperty(
                    comparison_operator="GREATER_THAN",
                    notification_type=kind,
                    threshold=percent,
                    threshold_type="PERCENTAGE",
                ),
                subscribers=[
                    budgets.CfnBudget.SubscriberProperty(subscription_type="SNS", address=security.alarms.topic_arn)
                ],
            )

        budgets.CfnBudget(
            self,
            "Budget",
            budget=budgets.CfnBudget.BudgetDataProperty(
                budget_type="COST",
                time_unit="MONTHLY",
                budget_limit=budgets.CfnBudget.SpendProperty(amount=profile.monthly_budget, unit="USD"),
            ),
            notifications_with_subscribers=[told("ACTUAL", 80), told("FORECASTED", 100)],
        )


def _known(name: Name) -> Name:
    """A name that runs give to a metric.

    Raises:
        ValueError: They give it to none: an alarm on it would never ring.
    """
    if name not in get_args(Name):
        raise ValueError(f"runs record no metric {name!r}, but {', '.join(get_args(Name))}")
    return name


def _metric(name: Name, statistic: str, period: Duration) -> cloudwatch.Metric:
    """A metric of runs without dimensions: those of jobs, and totals."""
    return cloudwatch.Metric(namespace=NAMESPACE, metric_name=_known(name), statistic=statistic, period=period)


def _search(name: Name, statistic: str) -> cloudwatch.MathExpression:
    """A metric of runs for each phase, model and pool."""
    expression = f"SEARCH('{{{NAMESPACE},phase,model,pool}} MetricName=\"{_known(name)}\"', '{statistic}')"
    return cloudwatch.MathExpression(expression=expression, label="", period=Duration.minutes(5), using_metrics={})
