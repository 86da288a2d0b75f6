"""What the templates promise, profile by profile: who can reach what, how it is encrypted, what it may do."""

from __future__ import annotations

import ipaddress
import json
import re
import tomllib
from pathlib import Path
from typing import Any, Final, get_args

import pytest

from blocks.job_ledger import JobLedger
from blocks.media_store import MediaStore
from infra.aws.cluster import PARALLELCLUSTER_VERSION
from infra.aws.profiles import NAMESPACE, PROFILES
from tasks.aws import AwsSettings, aws_client
from tasks.ledger.dynamodb import create_table
from tasks.metrics.samples import Name, samples_of_job
from tests.aws import running_aws
from tests.infra.aws.cloudformation import Installation, installation, statements
from tests.infra.aws.handler import load_handler

pytestmark = pytest.mark.infra

IMAGES: Final = Path(__file__).parents[3] / "infra" / "images"

LUSTRE_PORTS: Final = {(988, 988), (1018, 1023)}

#: Actions that take no resource, and whose `*` is therefore all there is. Others name what they are about.
WITHOUT_RESOURCE: Final = {
    "cloudwatch:PutMetricData",
    "ecr:GetAuthorizationToken",
    "ec2:AssignPrivateIpAddresses",
    "ec2:CreateNetworkInterface",
    "ec2:DeleteNetworkInterface",
    "ec2:DescribeNetworkInterfaces",
    "ec2:UnassignPrivateIpAddresses",
    "xray:PutTelemetryRecords",
    "xray:PutTraceSegments",
}


@pytest.fixture(params=PROFILES)
def aws(request: pytest.FixtureRequest) -> Installation:
    return installation(request.param)


# Who reaches what.


def _subnets(value: Any) -> set[str]:
    """All subnets that properties name."""
    if isinstance(value, dict):
        return set().union(*map(_subnets, value.values()))
    if isinstance(value, list):
        return set().union(*map(_subnets, value))
    return {value} if isinstance(value, str) and value.startswith("Network.Vpc") and "Subnet" in value else set()


def test_nothing_but_nat_gateways_is_in_a_public_subnet(aws: Installation) -> None:
    tables = {each.properties["RouteTableId"] for each in aws.of("AWS::EC2::Route") if "GatewayId" in each.properties}
    public = {
        each.properties["SubnetId"]
        for each in aws.of("AWS::EC2::SubnetRouteTableAssociation")
        if each.properties["RouteTableId"] in tables
    }
    assert len(public) == len(aws.profile.zones)
    inside = {each.kind for each in aws.resources if public & _subnets(each.properties)}
    assert inside == {"AWS::EC2::NatGateway", "AWS::EC2::SubnetRouteTableAssociation"}
    assert len(aws.of("AWS::EC2::NatGateway")) == aws.profile.nat_gateways
    assert all(not each.properties["MapPublicIpOnLaunch"] for each in aws.of("AWS::EC2::Subnet"))


def _clusters(aws: Installation) -> list[dict[str, Any]]:
    return [each.properties["ClusterConfiguration"] for each in aws.of("Custom::PclusterCluster")]


def test_clusters_are_in_private_subnets_of_all_zones(aws: Installation) -> None:
    clusters = _clusters(aws)
    assert len(clusters) == 1 + aws.profile.standby
    for cluster in clusters:
        used = _subnets(cluster)
        assert used and all(each.startswith("Network.VpcNodesSubnet") for each in used)
        zones = [len(queue["Networking"]["SubnetIds"]) for queue in cluster["Scheduling"]["SlurmQueues"]]
        assert max(zones) == len(aws.profile.zones)
    heads = {cluster["HeadNode"]["Networking"]["SubnetId"] for cluster in clusters}
    assert len(heads) == len(clusters), "the standby has its head node in another zone"


def test_the_load_balancer_is_internal_and_speaks_tls_alone(aws: Installation) -> None:
    balancer = aws.one("AWS::ElasticLoadBalancingV2::LoadBalancer")
    assert balancer.properties["Scheme"] == "internal"
    listeners = aws.of("AWS::ElasticLoadBalancingV2::Listener")
    ports = {each.properties["Port"]: each.properties for each in listeners if "Port" in each.properties}
    assert set(ports) == {443, 8443}
    assert {each["Protocol"] for each in ports.values()} == {"HTTPS"}
    assert all("TLS13" in each["SslPolicy"] for each in ports.values())


def test_people_get_in_only_by_signing_in_with_a_second_factor(aws: Installation) -> None:
    listeners = aws.of("AWS::ElasticLoadBalancingV2::Listener")
    (people,) = (each for each in listeners if each.properties["Port"] == 443)
    assert [action["Type"] for action in people.properties["DefaultActions"]] == ["fixed-response"]
    rules = aws.of("AWS::ElasticLoadBalancingV2::ListenerRule")
    pools = set()
    for rule in rules:
        first, second = sorted(rule.properties["Actions"], key=lambda action: action["Order"])
        assert (first["Type"], second["Type"]) == ("authenticate-cognito", "forward")
        pools.add(first["AuthenticateCognitoConfig"]["UserPoolArn"])
    assert len(pools) == len(rules) == 2, "operators and owners are different people"
    for pool in aws.of("AWS::Cognito::UserPool"):
        assert pool.properties["MfaConfiguration"] == "ON"
        assert pool.properties["AdminCreateUserConfig"]["AllowAdminCreateUserOnly"] is True


def _ingress(aws: Installation) -> list[tuple[str, dict[str, Any]]]:
    """Everything that lets something in: group and rule."""
    rules = [
        (f"{group.name}.GroupId", rule)
        for group in aws.of("AWS::EC2::SecurityGroup")
        for rule in group.properties.get("SecurityGroupIngress", [])
    ]
    return rules + [(each.properties["GroupId"], each.properties) for each in aws.of("AWS::EC2::SecurityGroupIngress")]


def test_no_security_group_lets_everybody_in(aws: Installation) -> None:
    rules = _ingress(aws)
    assert len(rules) > 10
    private = [ipaddress.ip_network(each) for each in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")]
    for group, rule in rules:
        assert "CidrIpv6" not in rule, group
        if "CidrIp" in rule:
            network = ipaddress.ip_network(rule["CidrIp"])
            assert any(network.subnet_of(each) for each in private), (group, network)
            assert rule["FromPort"] == rule["ToPort"] == 443, group
        assert not rule["FromPort"] <= 22 <= rule["ToPort"], group
        assert rule["IpProtocol"] == "tcp"


def test_scratch_is_reached_by_nodes_alone_and_on_lustres_ports_alone(aws: Installation) -> None:
    (group,) = aws.one("AWS::FSx::FileSystem").properties["SecurityGroupIds"]
    found: dict[str, set[tuple[int, int]]] = {}
    for target, rule in _ingress(aws):
        if target == group:
            found.setdefault(rule["SourceSecurityGroupId"], set()).add((rule["FromPort"], rule["ToPort"]))
    (clients,) = set(found) - {group}
    assert found == {clients: LUSTRE_PORTS, group: LUSTRE_PORTS}
    for cluster in _clusters(aws):
        places = [cluster["HeadNode"], *cluster["LoginNodes"]["Pools"], *cluster["Scheduling"]["SlurmQueues"]]
        assert all(clients in each["Networking"]["AdditionalSecurityGroups"] for each in places)


def test_nodes_are_reached_through_systems_manager_alone(aws: Installation) -> None:
    for cluster in _clusters(aws):
        places = [cluster["HeadNode"], *cluster["LoginNodes"]["Pools"]]
        assert all(each["Ssh"] == {"AllowedIps": "127.0.0.1/32"} for each in places)
        for each in (*places, *cluster["Scheduling"]["SlurmQueues"]):
            policies = [policy["Policy"] for policy in each["Iam"]["AdditionalIamPolicies"]]
            assert any(policy.endswith("AmazonSSMManagedInstanceCore") for policy in policies)


# Encryption and access.


def test_buckets_are_private_versioned_and_encrypted(aws: Installation) -> None:
    buckets = aws.of("AWS::S3::Bucket")
    assert {each.id[:-8] for each in buckets} == {"Logs", "Inputs", "Outputs", "Artifacts", "Trails"}
    policies = {each.properties["Bucket"]: statements(each) for each in aws.of("AWS::S3::BucketPolicy")}
    for bucket in buckets:
        properties = bucket.properties
        assert set(properties["PublicAccessBlockConfiguration"].values()) == {True}
        assert properties["VersioningConfiguration"] == {"Status": "Enabled"}
        (rule,) = properties["BucketEncryption"]["ServerSideEncryptionConfiguration"]
        used = rule["ServerSideEncryptionByDefault"]
        if bucket.id.startswith("Logs"):  # Services write their logs into no other.
            assert used == {"SSEAlgorithm": "AES256"}
        else:
            assert used["SSEAlgorithm"] == "aws:kms"
            assert used["KMSMasterKeyID"].startswith("Security.")
        denied = [each for each in policies[bucket.name] if each["Effect"] == "Deny"]
        assert any(each.get("Condition") == {"Bool": {"aws:SecureTransport": "false"}} for each in denied)


def test_what_is_kept_is_encrypted_with_keys_of_ones_own(aws: Installation) -> None:
    system = aws.one("AWS::FSx::FileSystem")
    table = aws.one("AWS::DynamoDB::Table")
    keys = [system.properties["KmsKeyId"], table.properties["SSESpecification"]["KMSMasterKeyId"]]
    keys += [each.properties["KmsKeyId"] for each in aws.of("AWS::RDS::DBCluster")]
    keys += [each.properties["KmsKeyId"] for each in aws.of("AWS::Logs::LogGroup")]
    keys += [each.properties["KmsMasterKeyId"] for each in aws.of("AWS::SQS::Queue")]
    keys += [each.properties["KmsKeyId"] for each in aws.of("AWS::SecretsManager::Secret")]
    keys += [each.properties["EncryptionConfiguration"]["KmsKey"] for each in aws.of("AWS::ECR::Repository")]
    keys += [each.properties["KmsKeyId"] for each in aws.of("AWS::ElastiCache::ReplicationGroup")]
    assert len(keys) >= 12
    assert all(each.startswith("Security.") for each in keys)
    assert all(each.properties["EnableKeyRotation"] for each in aws.of("AWS::KMS::Key"))


def test_no_secret_is_in_a_template(aws: Installation) -> None:
    for secret in aws.of("AWS::SecretsManager::Secret"):
        if "GenerateSecretString" not in secret.properties:
            said = secret.properties["SecretString"]
            assert "PREFECT_API_AUTH_STRING={{resolve:secretsmanager:" in said
    for task in aws.of("AWS::ECS::TaskDefinition"):
        for container in task.properties["ContainerDefinitions"]:
            named = {each["Name"] for each in container["Environment"]}
            assert not any(word in name for name in named for word in ("PASSWORD", "AUTH", "TOKEN"))


def test_policies_name_their_actions_and_resources(aws: Installation) -> None:
    policies = aws.of("AWS::IAM::ManagedPolicy")
    assert not [each for each in aws.of("AWS::IAM::Role") if "Policies" in each.properties]
    assert not aws.of("AWS::IAM::Policy"), "inline policies are in nobody's list"
    for policy in policies:
        for statement in statements(policy):
            assert statement["Effect"] == "Allow"
            assert not [action for action in statement["Action"] if "*" in action], policy.name
            if "*" in statement["Resource"]:
                assert set(statement["Action"]) <= WITHOUT_RESOURCE, policy.name
            for resource in statement["Resource"]:
                said = resource
                assert said == "*" or said.removesuffix("*") not in ("arn:aws:s3:::", "arn:aws:iam::"), policy.name
    metrics = [
        statement
        for policy in policies
        for statement in statements(policy)
        if "cloudwatch:PutMetricData" in statement["Action"]
    ]
    assert [each["Condition"] for each in metrics] == [{"StringEquals": {"cloudwatch:namespace": NAMESPACE}}]


def test_every_call_and_every_read_of_an_object_is_kept(aws: Installation) -> None:
    trail = aws.one("AWS::CloudTrail::Trail")
    assert trail.properties["IsMultiRegionTrail"] and trail.properties["EnableLogFileValidation"]
    (selector,) = trail.properties["EventSelectors"]
    assert selector["ReadWriteType"] == "All" and selector["IncludeManagementEvents"]
    (objects,) = selector["DataResources"]
    assert objects["Type"] == "AWS::S3::Object"
    watched = {each.removesuffix(".Arn/") for each in objects["Values"]}
    assert watched == {aws.named(f"Storage.{each}").name for each in ("Inputs", "Outputs", "Artifacts")}
    assert aws.one("AWS::EC2::FlowLog").properties["TrafficType"] == "ALL"


# What the application expects.


def test_the_ledger_is_the_table_that_the_code_would_make(aws: Installation) -> None:
    table = aws.one("AWS::DynamoDB::Table")
    properties = table.properties
    with running_aws() as settings:
        create_table(settings, "jobs")
        client = aws_client("dynamodb", AwsSettings(settings.region, settings.endpoint_url))
        made = client.describe_table(TableName="jobs")["Table"]
        lives = client.describe_time_to_live(TableName="jobs")["TimeToLiveDescription"]

    def indexes(found: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
        return sorted(
            (each["IndexName"], json.dumps(each["KeySchema"]), each["Projection"]["ProjectionType"]) for each in found
        )

    def attributes(found: list[dict[str, str]]) -> set[tuple[str, str]]:
        return {(each["AttributeName"], each["AttributeType"]) for each in found}

    assert properties["KeySchema"] == made["KeySchema"]
    assert attributes(properties["AttributeDefinitions"]) == attributes(made["AttributeDefinitions"])
    assert indexes(properties["GlobalSecondaryIndexes"]) == indexes(made["GlobalSecondaryIndexes"])
    assert properties["TimeToLiveSpecification"]["AttributeName"] == lives["AttributeName"]
    assert properties["TimeToLiveSpecification"]["Enabled"] is True
    assert properties["PointInTimeRecoverySpecification"]["PointInTimeRecoveryEnabled"] is True


def test_alarms_look_at_metrics_that_runs_record(aws: Installation) -> None:
    bare = {each.name for each in samples_of_job("failed", seconds=1.0) if not each.phase + each.model + each.pool}
    alarms = [each.properties for each in aws.of("AWS::CloudWatch::Alarm")]
    ours = {each["MetricName"] for each in alarms if each.get("Namespace") == NAMESPACE}
    assert ours == {"JobsFailed", "JobsPublished"} and ours <= bare
    assert not [each for each in alarms if each.get("Namespace") == NAMESPACE and each.get("Dimensions")]
    said = [part.get("Expression", "") for each in alarms for part in each.get("Metrics", [])]
    queries = [re.fullmatch(r'SELECT MAX\((\w+)\) FROM "(\w+)"', each) for each in said if "SELECT" in each]
    assert [query and query.groups() for query in queries] == [("QueueWait", NAMESPACE)]
    assert "QueueWait" in get_args(Name)
    dashboard = aws.one("AWS::CloudWatch::Dashboard").properties["DashboardBody"]
    shown = set(re.findall(rf'"{NAMESPACE}","(\w+)"|MetricName=\\+"(\w+)', dashboard))
    assert len(shown) > 5 and {first or second for first, second in shown} <= set(get_args(Name))


def test_every_alarm_tells_somebody(aws: Installation) -> None:
    alarms = aws.of("AWS::CloudWatch::Alarm")
    wanted = {"JobsFailed", "NoJobEnds", "ChunksWait", "UploadsWait", "UploadsDead", "ScratchFull", "NodesDoNotStart"}
    for name in wanted:
        assert [each for each in alarms if each.id.startswith(name)], name
    for alarm in alarms:
        (action,) = alarm.properties["AlarmActions"]
        assert action.startswith("Security.Alarms"), alarm.name
        assert alarm.properties["AlarmDescription"]
    assert aws.one("AWS::SNS::Subscription").properties["TopicArn"] == aws.one("AWS::SNS::Topic").name
    budget = aws.one("AWS::Budgets::Budget")
    assert budget.properties["Budget"]["BudgetLimit"] == {"Amount": aws.profile.monthly_budget, "Unit": "USD"}


def test_queues_of_the_cluster_are_at_zero_until_jobs_wait(aws: Installation) -> None:
    for cluster in _clusters(aws):
        queues = cluster["Scheduling"]["SlurmQueues"]
        assert {queue["Name"] for queue in queues} == {queue.name for queue in aws.profile.queues.queues}
        assert {resource["MinCount"] for queue in queues for resource in queue["ComputeResources"]} == {0}


def test_clusters_are_of_the_version_that_their_configuration_is_for(aws: Installation) -> None:
    provider = aws.one("AWS::CloudFormation::Stack")
    assert f"/parallelcluster/{PARALLELCLUSTER_VERSION}/" in provider.properties["TemplateURL"]
    names = [each.properties["ClusterName"] for each in aws.of("Custom::PclusterCluster")]
    assert len(set(names)) == len(names) and all(len(name) <= 40 for name in names)


def test_the_blocks_of_the_site_are_blocks(aws: Installation) -> None:
    bucket = aws.named("Storage.Inputs").name  # Not what S3 allows; its real name is AWS's choice.
    blocks = tomllib.loads(aws.outputs["Orchestrator.Blocks"].replace(bucket, "inputs"))
    store = MediaStore(**blocks["media-store"]["aws"]).settings()
    assert [folder for _, folder in store.mounts] == ["/fsx/inputs"]
    ledger = JobLedger(**blocks["job-ledger"]["aws"]).settings()
    assert ledger.metrics.namespace == NAMESPACE
    assert ledger.ledger.table == aws.one("AWS::DynamoDB::Table").name
    shown = {each.properties["FileSystemPath"]: each for each in aws.of("AWS::FSx::DataRepositoryAssociation")}
    assert shown["/inputs"].properties["DataRepositoryPath"].replace(bucket, "inputs") == store.mounts[0][0]


def test_the_event_handler_is_fed_as_it_asks(aws: Installation) -> None:
    mapping = aws.one("AWS::Lambda::EventSourceMapping")
    function = aws.one("AWS::Lambda::Function")
    queue, dead = aws.named("Events.Uploads"), aws.named("Events.Dead")
    assert mapping.properties["FunctionResponseTypes"] == ["ReportBatchItemFailures"]
    assert mapping.properties["BatchSize"] == 10
    assert function.properties["Timeout"] == 120
    assert queue.properties["VisibilityTimeout"] == 6 * function.properties["Timeout"]
    redrive = queue.properties["RedrivePolicy"]
    assert redrive["maxReceiveCount"] == 5 and redrive["deadLetterTargetArn"] == f"{dead.name}.Arn"
    rule = aws.one("AWS::Events::Rule")
    pattern = rule.properties["EventPattern"]
    assert (pattern["source"], pattern["detail-type"]) == (["aws.s3"], ["Object Created"])
    inputs = aws.named("Storage.Inputs")
    assert inputs.properties["NotificationConfiguration"]["EventBridgeConfiguration"] == {"EventBridgeEnabled": True}
    assert pattern["detail"]["bucket"]["name"] == [inputs.name]


def test_the_event_handlers_settings_are_settings(aws: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.parameters import UpscaleOptions

    function = aws.one("AWS::Lambda::Function")
    for name, value in function.properties["Environment"]["Variables"].items():
        monkeypatch.setenv(name, (value))
    settings = load_handler().Settings.from_environment()
    assert settings.inputs == "incoming/" and settings.folder == "upscaled/"
    assert UpscaleOptions(**settings.options).ledger == "aws"
    assert function.properties["Handler"] == "handler.handler"


def test_a_new_handler_gets_a_tenth_of_the_events_first(aws: Installation) -> None:
    group = aws.one("AWS::CodeDeploy::DeploymentGroup")
    properties = group.properties
    assert properties["DeploymentConfigName"] == "CodeDeployDefault.LambdaCanary10Percent5Minutes"
    assert properties["AlarmConfiguration"]["Enabled"] is True
    assert set(properties["AutoRollbackConfiguration"]["Events"]) == {"DEPLOYMENT_FAILURE", "DEPLOYMENT_STOP_ON_ALARM"}
    alias = aws.one("AWS::Lambda::Alias")
    mapping = aws.one("AWS::Lambda::EventSourceMapping")
    fed = mapping.properties["FunctionName"]
    assert alias.name in fed and fed.endswith(":live"), "events go to the alias, not to one version"
    warm = alias.properties.get("ProvisionedConcurrencyConfig", {}).get("ProvisionedConcurrentExecutions", 0)
    assert warm == aws.profile.warm_functions


def test_servers_are_replaced_without_a_gap_and_rolled_back(aws: Installation) -> None:
    services = aws.of("AWS::ECS::Service")
    for service in services:
        properties = service.properties
        assert properties["DeploymentConfiguration"]["DeploymentCircuitBreaker"] == {"Enable": True, "Rollback": True}
        network = properties["NetworkConfiguration"]["AwsvpcConfiguration"]
        assert network["AssignPublicIp"] == "DISABLED"
        assert len(network["Subnets"]) == len(aws.profile.zones)
        if properties.get("LoadBalancers"):
            assert properties["DeploymentConfiguration"]["MinimumHealthyPercent"] == 100
    assert bool(aws.of("AWS::ElastiCache::ReplicationGroup")) == aws.profile.has_cache
    api = aws.named("Orchestrator.ApiService", "AWS::ECS::Service")
    assert api.properties["DesiredCount"] == aws.profile.api_servers


def test_the_api_has_a_password_and_only_nodes_handlers_and_portal_reach_it(aws: Installation) -> None:
    task = aws.named("Orchestrator.ApiTask")
    (container,) = task.properties["ContainerDefinitions"]
    assert "PREFECT_SERVER_API_AUTH_STRING" in {each["Name"] for each in container["Secrets"]}
    balancer = aws.one("AWS::ElasticLoadBalancingV2::LoadBalancer")
    (group,) = balancer.properties["SecurityGroups"]
    callers = {
        rule["SourceSecurityGroupId"] for target, rule in _ingress(aws) if (target, rule["FromPort"]) == (group, 8443)
    }
    names = {each.removesuffix(".GroupId")[:-8] for each in callers}
    assert names == {"Network.ApiClients", "Network.Servers"}


def test_servers_settings_are_prefects(aws: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.settings import Settings

    task = aws.named("Orchestrator.ApiTask")
    (container,) = task.properties["ContainerDefinitions"]
    for entry in container["Environment"]:
        monkeypatch.setenv(entry["Name"], str(entry["Value"]))
    for entry in container["Secrets"]:
        monkeypatch.setenv(entry["Name"], "secret")
    server = Settings().server
    assert server.database.driver == "postgresql+asyncpg" and server.database.port == 5433
    assert server.database.user == "secret" and server.database.host.startswith("Data.Prefect")
    assert server.api.auth_string is not None and server.api.auth_string.get_secret_value() == "secret"
    assert server.database.migrate_on_start is not aws.profile.has_cache
    if aws.profile.has_cache:
        assert server.events.messaging_broker == "prefect_redis.messaging"
        assert server.concurrency.lease_storage == "prefect_redis.lease_storage"


def test_containers_write_where_their_images_let_them_and_nowhere_else(aws: Installation) -> None:
    images = {each.name: each.id[:-8].lower() for each in aws.of("AWS::ECR::Repository")}
    tasks = aws.of("AWS::ECS::TaskDefinition")
    assert tasks
    for task in tasks:
        (container,) = task.properties["ContainerDefinitions"]
        assert container["ReadonlyRootFilesystem"] is True
        (name,) = (image for repository, image in images.items() if repository in container["Image"])
        volumes = re.findall(r"^VOLUME (\S+)$", (IMAGES / f"{name}.Dockerfile").read_text(), re.MULTILINE)
        assert [each["ContainerPath"] for each in container["MountPoints"]] == volumes
        writable = [each["Value"] for each in container["Environment"] if each["Name"].endswith("_HOME")]
        assert writable and all(folder.startswith("/tmp/") for folder in writable)


def test_images_cannot_be_replaced_and_are_scanned(aws: Installation) -> None:
    for repository in aws.of("AWS::ECR::Repository"):
        assert repository.properties["ImageTagMutability"] == "IMMUTABLE"
        assert repository.properties["ImageScanningConfiguration"] == {"ScanOnPush": True}


def test_databases_have_copies_in_other_zones_where_the_profile_says_so(aws: Installation) -> None:
    instances = aws.of("AWS::RDS::DBInstance")
    wanted = 1 + aws.profile.database_readers + aws.profile.accounting_instances
    assert len(instances) == wanted
    assert not [each for each in instances if each.properties.get("PubliclyAccessible")]
    for cluster in aws.of("AWS::RDS::DBCluster"):
        assert cluster.properties["DeletionProtection"] is True
        assert cluster.properties["BackupRetentionPeriod"] == aws.profile.backup_days


def test_templates_can_be_deployed_to_any_account(aws: Installation) -> None:
    for name, template in aws.templates.items():
        said = json.dumps(template)
        assert "unknown-account" not in said, name
        assert not any(each in said for each in ("/work/", "/root/", "/home/")), name
