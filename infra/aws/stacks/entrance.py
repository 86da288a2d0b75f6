"""Who comes in, and how: load balancer, firewall, sign-in, names. Part of the orchestrator's stack."""

from __future__ import annotations

from typing import NamedTuple

from aws_cdk import Duration, Fn, RemovalPolicy, Stack
from aws_cdk import aws_cognito as cognito
from aws_cdk import aws_elasticloadbalancingv2 as elb
from aws_cdk import aws_elasticloadbalancingv2_actions as actions
from aws_cdk import aws_kms as kms
from aws_cdk import aws_logs as logs
from aws_cdk import aws_route53 as route53
from aws_cdk import aws_route53_targets as targets
from aws_cdk import aws_s3 as s3
from aws_cdk import aws_wafv2 as waf
from constructs import Construct

from infra.aws.profiles import Profile
from infra.aws.stacks.keeping import removal, retention
from infra.aws.stacks.network import NetworkStack


def internal_balancer(scope: Construct, network: NetworkStack, access_logs: s3.IBucket) -> elb.ApplicationLoadBalancer:
    """The one way in, from inside the network; every request is logged."""
    balancer = elb.ApplicationLoadBalancer(
        scope,
        "Balancer",
        vpc=network.vpc,
        vpc_subnets=network.nodes,
        internet_facing=False,
        security_group=network.known(scope, network.balancer),
        drop_invalid_header_fields=True,
        deletion_protection=True,
    )
    balancer.log_access_logs(access_logs, "balancer")
    return balancer


def add_firewall(scope: Construct, profile: Profile, balancer: elb.ApplicationLoadBalancer, key: kms.IKey) -> None:
    """Rules of AWS against what is known to be an attack; nodes send logs of runs, which may look like one."""
    api = waf.CfnWebACL.StatementProperty(
        byte_match_statement=waf.CfnWebACL.ByteMatchStatementProperty(
            field_to_match=waf.CfnWebACL.FieldToMatchProperty(single_header={"Name": "host"}),
            positional_constraint="STARTS_WITH",
            search_string="api.",
            text_transformations=[waf.CfnWebACL.TextTransformationProperty(priority=0, type="LOWERCASE")],
        )
    )
    people = waf.CfnWebACL.StatementProperty(not_statement=waf.CfnWebACL.NotStatementProperty(statement=api))
    # Forms of runs are larger than the 8 KB that this rule lets through.
    large = waf.CfnWebACL.RuleActionOverrideProperty(
        name="SizeRestrictions_BODY", action_to_use=waf.CfnWebACL.RuleActionProperty(count={})
    )
    wall = waf.CfnWebACL(
        scope,
        "Firewall",
        scope="REGIONAL",
        default_action=waf.CfnWebACL.DefaultActionProperty(allow={}),
        visibility_config=_seen("Firewall"),
        rules=[
            waf.CfnWebACL.RuleProperty(
                name=title,
                priority=priority,
                override_action=waf.CfnWebACL.OverrideActionProperty(none={}),
                visibility_config=_seen(title),
                statement=waf.CfnWebACL.StatementProperty(
                    managed_rule_group_statement=waf.CfnWebACL.ManagedRuleGroupStatementProperty(
                        vendor_name="AWS",
                        name=f"AWSManagedRules{title}RuleSet",
                        scope_down_statement=only_for,
                        rule_action_overrides=passed,
                    )
                ),
            )
            for priority, (title, only_for, passed) in enumerate(
                [("KnownBadInputs", None, None), ("Common", people, [large])]
            )
        ],
    )
    waf.CfnWebACLAssociation(
        scope, "FirewallOfBalancer", resource_arn=balancer.load_balancer_arn, web_acl_arn=wall.attr_arn
    )
    group = logs.LogGroup(
        scope,
        "FirewallLogs",
        log_group_name=f"aws-waf-logs-superres-{profile.name}",  # The service takes no other beginning.
        encryption_key=key,
        retention=retention(profile),
        removal_policy=RemovalPolicy.DESTROY,
    )
    waf.CfnLoggingConfiguration(
        scope, "FirewallLogging", resource_arn=wall.attr_arn, log_destination_configs=[group.log_group_arn]
    )


class SignIn(NamedTuple):
    """How people of one kind sign in."""

    pool: cognito.UserPool
    client: cognito.UserPoolClient
    domain: cognito.UserPoolDomain

    def then(self, group: elb.ApplicationTargetGroup) -> elb.ListenerAction:
        """Let those through to a group who have signed in, for a working day."""
        return actions.AuthenticateCognitoAction(
            user_pool=self.pool,
            user_pool_client=self.client,
            user_pool_domain=self.domain,
            session_timeout=Duration.hours(8),
            next=elb.ListenerAction.forward([group]),
        )


def sign_in(scope: Stack, profile: Profile, people: str, address: str) -> SignIn:
    """Users of one kind, whom an administrator invites, with a second factor.

    Args:
        scope: The stack.
        profile: Says whether users outlive it.
        people: What they are.
        address: Where they come back to: `https://` and host.
    """
    pool = cognito.UserPool(
        scope,
        people,
        self_sign_up_enabled=False,
        sign_in_aliases=cognito.SignInAliases(email=True),
        mfa=cognito.Mfa.REQUIRED,
        mfa_second_factor=cognito.MfaSecondFactor(sms=False, otp=True),
        account_recovery=cognito.AccountRecovery.EMAIL_ONLY,
        password_policy=cognito.PasswordPolicy(
            min_length=14,
            require_lowercase=True,
            require_uppercase=True,
            require_digits=True,
            require_symbols=True,
        ),
        feature_plan=cognito.FeaturePlan.PLUS,
        standard_threat_protection_mode=cognito.StandardThreatProtectionMode.FULL_FUNCTION,
        deletion_protection=profile.keep_data,
        removal_policy=removal(profile),
    )
    client = pool.add_client(
        "Balancer",
        generate_secret=True,
        prevent_user_existence_errors=True,
        supported_identity_providers=[cognito.UserPoolClientIdentityProvider.COGNITO],
        o_auth=cognito.OAuthSettings(
            flows=cognito.OAuthFlows(authorization_code_grant=True),
            scopes=[cognito.OAuthScope.OPENID],
            callback_urls=[Fn.join("", [address, "/oauth2/idpresponse"])],
        ),
    )
    domain = pool.add_domain(
        "Domain",
        cognito_domain=cognito.CognitoDomainOptions(
            domain_prefix=f"superres-{profile.name}-{people.lower()}-{scope.account}"
        ),
    )
    return SignIn(pool, client, domain)


def add_names(scope: Construct, domain: str, network: NetworkStack, balancer: elb.ApplicationLoadBalancer) -> None:
    """Names of the three doors, known inside the network alone."""
    zone = route53.PrivateHostedZone(scope, "Zone", zone_name=domain, vpc=network.vpc)
    target = route53.RecordTarget.from_alias(targets.LoadBalancerTarget(balancer))
    for host in ("prefect", "media", "api"):
        route53.ARecord(scope, f"{host.capitalize()}Name", zone=zone, record_name=host, target=target)


def _seen(name: str) -> waf.CfnWebACL.VisibilityConfigProperty:
    return waf.CfnWebACL.VisibilityConfigProperty(
        cloud_watch_metrics_enabled=True, metric_name=name, sampled_requests_enabled=True
    )
