"""The JSON of the management API: what it takes and what it gives. Times are milliseconds since 1970 UTC; messageIds exceed
2^53 and are strings. Secrets are members of the documents that say so, and of no list."""

from __future__ import annotations

import base64
from dataclasses import replace
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StringConstraints,
    WithJsonSchema,
    model_validator,
)
from pydantic.alias_generators import to_camel

from uplinkd.admin.jobs import Job, JobState
from uplinkd.admin.words import told
from uplinkd.asking import Consumer, HookState, Trial
from uplinkd.core.errors import EXPLANATIONS, MESSAGES, Code, Rejected
from uplinkd.core.groups import Form, Group, Kind, Plan, Webhook, shown_url
from uplinkd.core.model import App, Census, Device, Message, Origin, Product, ProductKey, Right, State, TopicClass
from uplinkd.core.operators import ApiKey, AuditEntry, Role, Scope, User
from uplinkd.core.workbench import Examined
from uplinkd.engine import DeadLetter
from uplinkd.engine.standing import Standing
from uplinkd.journal import Refusal

__all__ = [
    "AppDocument",
    "AppWithSecret",
    "AuditDocument",
    "Broadcast",
    "BulkCreation",
    "CensusDocument",
    "ConsumerDocument",
    "Counted",
    "DeadLetterDocument",
    "DeadLetters",
    "DeadLettersOrAll",
    "DeviceDocument",
    "DeviceWithSecret",
    "DoorsDocument",
    "FiguresDocument",
    "GroupChange",
    "GroupDocument",
    "GroupReset",
    "GroupStateDocument",
    "GroupWithSecret",
    "HookDocument",
    "JobDocument",
    "KeyDocument",
    "KeyWithSecret",
    "ListedGroup",
    "MessageDocument",
    "MessageSent",
    "NewApp",
    "NewDevice",
    "NewGroup",
    "NewKey",
    "NewMessage",
    "NewProduct",
    "NewTopicClass",
    "NewUser",
    "NewWebhook",
    "Page",
    "Problem",
    "ProductDocument",
    "ProductWithSecret",
    "RefusalDocument",
    "SecretDocument",
    "SettingDocument",
    "StatsDocument",
    "TopicClassDocument",
    "UserDocument",
    "UserWithPassword",
    "WebhookDocument",
]

T = TypeVar("T")


def _shape(pattern: str) -> WithJsonSchema:
    """What the description says of a text; the registry keeps the rule, since its words are for people."""
    return WithJsonSchema({"type": "string", "pattern": pattern})


_Short = StringConstraints(max_length=1024)
Text = Annotated[str, _Short]
ProductName = Annotated[str, _Short, _shape(r"^[A-Za-z0-9][A-Za-z0-9 ]{2,28}[A-Za-z0-9]$")]
ProductKeyText = Annotated[str, _Short, _shape(r"^[A-Za-z0-9]{1,30}$")]
DeviceNameText = Annotated[str, _Short, _shape(r"^[A-Za-z0-9_@.:-]{4,32}$")]
SecretText = Annotated[str, _Short, _shape(r"^[A-Za-z0-9]{1,64}$")]
NameText = Annotated[str, _Short, _shape(r"^[A-Za-z0-9_.-]{1,64}$")]
Levels = Annotated[str, _Short, _shape(r"^[A-Za-z0-9_]+(/[A-Za-z0-9_]+){0,4}$")]


class _Document(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True)


class _Given(_Document):
    """What a client sends: a member that is not known is a mistake, not something to pass over."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="forbid")


class Problem(BaseModel):
    """RFC 9457. `detail` says what was wrong, with which value, and what to do."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    errors: list[dict[str, Any]] | None = Field(None, description="for 422: each value that breaks a rule, and where")


class Page(_Document, Generic[T]):
    """`next` is the cursor of the page that follows; null: there is none."""

    items: list[T]
    next: str | None = None


class GatewayDocument(_Document):
    """A gateway that lives, as its workers tell each second."""

    gateway: str
    version: str
    workers: int
    connections: int = Field(description="of devices and applications, over HTTPS and MQTT")
    since: int = Field(description="when its first worker started, ms since 1970")


class ProductDocument(_Document):
    product_key: str
    name: str
    create_time: int

    @classmethod
    def of(cls, product: Product) -> Self:
        return cls(product_key=product.key, name=product.name, create_time=product.created)


class ProductWithSecret(ProductDocument):
    product_secret: str

    @classmethod
    def of(cls, product: Product) -> Self:
        return cls(
            product_key=product.key,
            name=product.name,
            create_time=product.created,
            product_secret=product.secret,
        )


class NewProduct(_Given):
    name: ProductName = Field(description="4 to 30 printable characters", examples=["my lamps"])
    product_key: ProductKeyText | None = Field(None, description="1 to 30 letters and digits; made when left out")
    product_secret: SecretText | None = Field(None, description="1 to 64 printable characters; made when left out")


class ProductChange(_Given):
    name: ProductName = Field(description="4 to 30 printable characters")


class CensusDocument(_Document):
    total: int
    online: int
    offline: int
    inactive: int
    disabled: int

    @classmethod
    def of(cls, census: Census) -> Self:
        return cls(
            total=census.total,
            online=census.online,
            offline=census.offline,
            inactive=census.inactive,
            disabled=census.disabled,
        )


class DeviceDocument(_Document):
    product_key: str
    device_name: str
    state: State
    connection: Literal["", "mqtt", "https"]
    last_seen: int | None
    client_ip: str
    create_time: int
    active_time: int | None

    @classmethod
    def of(cls, device: Device, *, now: int, timeout: int) -> Self:
        return cls(**_device(device, now, timeout))


class DeviceWithSecret(DeviceDocument):
    device_secret: str

    @classmethod
    def of(cls, device: Device, *, now: int, timeout: int) -> Self:
        return cls(**_device(device, now, timeout), device_secret=device.secret)


def _device(device: Device, now: int, timeout: int) -> dict[str, Any]:
    return {
        "product_key": device.product_key,
        "device_name": device.name,
        "state": device.state(now=now, online_timeout=timeout),
        "connection": device.connection(now=now, online_timeout=timeout),
        "last_seen": device.last_seen,
        "client_ip": device.address,
        "create_time": device.created,
        "active_time": device.activated,
    }


class NewDevice(_Given):
    device_name: DeviceNameText | None = Field(
        None, description="4 to 32 letters, digits and - _ @ . : ; made when left out"
    )
    device_secret: SecretText | None = Field(None, description="1 to 64 printable characters; made when left out")


class DeviceChange(_Given):
    enabled: StrictBool


class BulkCreation(_Given):
    product_key: ProductKeyText
    prefix: Text = Field(description="what the names begin with", examples=["lamp-"])
    count: StrictInt = Field(ge=1, le=100_000)
    start: StrictInt = Field(1, ge=0, le=10**9, description="the first number")


class SecretDocument(_Document):
    secret: str


class TopicClassDocument(_Document):
    topic_class: str = Field(examples=["/a1XXXXXXXXX/${deviceName}/user/update"])
    levels: str
    right: Right

    @classmethod
    def of(cls, product_key: str, topic_class: TopicClass) -> Self:
        levels = topic_class.levels
        return cls(topic_class=f"/{product_key}/${{deviceName}}/{levels}", levels=levels, right=topic_class.right)


class NewTopicClass(_Given):
    levels: Levels = Field(description="what follows /${productKey}/${deviceName}/", examples=["user/update"])
    right: Right


class MessageDocument(_Document):
    message_id: str
    topic: str
    product_key: str
    device_name: str
    generate_time: int
    origin: Origin
    size: int
    payload: str = Field(description="base64")
    text: str | None = Field(description="the payload as text, null when it is not UTF-8")

    @classmethod
    def of(cls, message: Message) -> Self:
        try:
            text = message.payload.decode()
        except UnicodeDecodeError:
            text = None
        return cls(
            message_id=str(message.id),
            topic=message.topic,
            product_key=message.product_key,
            device_name=message.device_name,
            generate_time=message.generate_time,
            origin=message.origin,
            size=len(message.payload),
            payload=base64.b64encode(message.payload).decode(),
            text=text,
        )


class NewMessage(_Given):
    topic: Text = Field(examples=["/a1XXXXXXXXX/lamp-0001/user/get"])
    text: str | None = Field(None, description="the payload as text; this or `payload`", max_length=300_000)
    payload: str | None = Field(None, description="the payload in base64", max_length=400_000)

    @model_validator(mode="after")
    def _one_payload(self) -> Self:
        if self.text is not None and self.payload is not None:
            raise ValueError("give text or payload, not both")
        self.data()
        return self

    def data(self) -> bytes:
        """The payload; ValueError when it is not base64."""
        if self.payload is not None:
            return base64.b64decode(self.payload, validate=True)
        return (self.text or "").encode(errors="surrogatepass")


class MessageSent(_Document):
    topic: str
    message_id: str
    way: Literal["mqtt", "waits"] = Field(
        description="mqtt: a session gets it; waits: it rides home in the answer to the next report"
    )


class Broadcast(_Document):
    topic: str
    sessions: int


class RefusalDocument(_Document):
    id: str
    request_id: str
    time: int
    endpoint: str
    code: int
    message: str
    status: int
    product_key: str
    device_name: str
    address: str
    topic: str
    times: int = Field(description="it stands for so many alike; what flow control holds back is recorded together")
    gateway: str = Field(description="which gateway said so; empty where there is one alone")
    reason: str = Field(description="why, in the language of the request")
    means: str = Field(description="what the code means, in the language of the request")
    advice: str = Field(description="what to do about it")

    @classmethod
    def of(cls, refusal: Refusal, language: str = "en") -> Self:
        code = Code(refusal.code)
        words = EXPLANATIONS[code]
        means, advice = (words.means_zh, words.do_zh) if language == "zh" else (words.means, words.do)
        return cls(
            id=str(refusal.id),
            request_id=refusal.request_id,
            time=refusal.at,
            endpoint=refusal.endpoint,
            code=refusal.code,
            message="" if code is Code.SUCCESS else MESSAGES[code],
            status=refusal.status,
            product_key=refusal.product_key,
            device_name=refusal.device_name,
            address=refusal.address,
            topic=refusal.topic,
            times=refusal.times,
            gateway=refusal.gateway,
            reason=told(language, refusal.reason),
            means="" if code is Code.SUCCESS else means,
            advice="" if code is Code.SUCCESS else advice,
        )


class AppDocument(_Document):
    name: str
    key: str
    products: list[str]
    sends: bool
    create_time: int

    @classmethod
    def of(cls, app: App) -> Self:
        return cls(name=app.name, key=app.key, products=list(app.products), sends=app.sends, create_time=app.created)


class AppWithSecret(AppDocument):
    secret: str = Field(description="shown this once")


class NewApp(_Given):
    name: NameText = Field(description="1 to 64 letters, digits and - _ .")
    products: list[ProductKeyText] = Field(default_factory=list, max_length=1000)
    sends: StrictBool = True


class DoorsDocument(_Document):
    nats: str = Field(description="URL of NATS for applications, empty: they have none")
    mqtt: str = Field(description="URL of MQTT, empty: there is none")
    own_nats: bool = Field(
        description="NATS is the owner's, where their own accounts hold and these credentials do not"
    )
    amqp: str = Field(description="URL of AMQP for consumer groups, empty: there is none")
    streams: list[str] = Field(
        description="the streams of NATS in which the messages are, several by the setting partitions"
    )


class AppChange(_Given):
    products: list[ProductKeyText] = Field(max_length=1000)


Url = Annotated[str, StringConstraints(max_length=2048)]
Number = Annotated[float, Field(strict=True, ge=0, le=1_000_000, allow_inf_nan=False)]
Integer = Annotated[int, Field(strict=True, ge=0, le=1_000_000)]
Numbers = Annotated[list[Annotated[str, _shape(r"^[0-9]{1,19}$")]], Field(min_length=1, max_length=1000)]
Moment = Annotated[int, Field(strict=True, ge=0, lt=1 << 53)]


class WebhookDocument(_Document):
    """Where and how messages are posted, as CloudEvents. The URL's query is for admins, since it may hold a secret."""

    url: str
    form: Form
    batch: int = Field(description="at most so many messages in a request of the form batch")
    linger: float = Field(description="how many seconds the first of a batch waits for others")
    lanes: int = Field(description="requests under way at a time; those of one device are one by one")
    timeout: float = Field(description="seconds for an attempt")

    @classmethod
    def of(cls, webhook: Webhook, *, whole: bool) -> Self:
        return cls(
            url=webhook.url if whole else shown_url(webhook.url),
            form=webhook.form,
            batch=webhook.batch,
            linger=webhook.linger,
            lanes=webhook.lanes,
            timeout=webhook.timeout,
        )


class NewWebhook(_Given):
    url: Url
    form: Form = Form.BINARY
    batch: Integer = 100
    linger: Number = 0.0
    lanes: Integer = 4
    timeout: Number = 10.0

    def webhook(self) -> Webhook:
        return Webhook(
            url=self.url,
            form=self.form,
            batch=self.batch,
            linger=self.linger,
            lanes=self.lanes,
            timeout=self.timeout,
        )


class FiguresDocument(_Document):
    """How far a group is. `lag` counts messages that it has not accepted, `held` those of them that a consumer holds, `retrying` dead
    letters that are offered again; `oldest` is when the oldest was stored. `settled` deliveries came to an end since the position
    was set, `rate` of them in a second lately."""

    lag: int
    held: int
    oldest: int | None
    settled: int
    dead: int
    retrying: int
    rate: float | None

    @classmethod
    def of(cls, standing: Standing) -> Self:
        state = standing.state
        return cls(
            lag=state.lag,
            held=state.held,
            oldest=state.oldest,
            settled=state.settled,
            dead=state.dead,
            retrying=state.retrying,
            rate=standing.rate,
        )


class ConsumerDocument(_Document):
    """A connection over AMQP: it holds `held` messages and would take `credit` more."""

    app: str
    client: str
    address: str
    since: int
    held: int
    credit: int

    @classmethod
    def of(cls, consumer: Consumer) -> Self:
        return cls(
            app=consumer.app,
            client=consumer.client,
            address=consumer.address,
            since=consumer.since,
            held=consumer.held,
            credit=consumer.credit,
        )


class HookDocument(_Document):
    """How the webhook fares since the server was started or the group changed; `open`: it counts as dead, and is tried at `nextTry`
    alone. A time of 0: never."""

    open: bool
    accepted: int
    failed: int
    last_success: int
    last_failure: int
    fault: str
    next_try: int

    @classmethod
    def of(cls, hook: HookState) -> Self:
        return cls(
            open=hook.open,
            accepted=hook.accepted,
            failed=hook.failed,
            last_success=hook.last_success,
            last_failure=hook.last_failure,
            fault=hook.fault,
            next_try=hook.next_try,
        )


class GroupStateDocument(FiguresDocument):
    consumers: list[ConsumerDocument]
    webhook: HookDocument | None = Field(description="null where there is no webhook, or no process that posts")


class GroupDocument(_Document):
    name: str
    all_products: bool
    products: list[str]
    topic: str
    kinds: list[Kind]
    start: int
    ack_wait: float = Field(description="seconds that a consumer may hold a message before it comes again")
    tries: int
    apps: list[str]
    webhook: WebhookDocument | None
    paused: bool
    create_time: int

    @classmethod
    def of(cls, group: Group, scope: Scope = Scope.READ) -> Self:
        """As somebody with `scope` may see it."""
        plan = group.plan
        whole = scope.covers(Scope.ADMIN)
        return cls(
            name=group.name,
            all_products=plan.products is None,
            products=list(plan.products or ()),
            topic=plan.topic,
            kinds=[kind for kind in Kind if kind in plan.kinds],
            start=group.start,
            ack_wait=plan.ack_wait,
            tries=plan.tries,
            apps=list(plan.apps),
            webhook=WebhookDocument.of(plan.webhook, whole=whole) if plan.webhook else None,
            paused=plan.paused,
            create_time=group.created,
        )


class ListedGroup(GroupDocument):
    """What is not known while the engine is away is null: how far it is, how many consumers are connected over AMQP now, whether its
    webhook counts as dead."""

    state: FiguresDocument | None
    consumers: int | None
    webhook_open: bool | None


class GroupWithSecret(GroupDocument):
    secret: str | None = Field(description="signs what its webhook gets; shown this once, and null where none was made")


class _GroupFacts(_Given):
    all_products: StrictBool | None = Field(None, description="messages of all products, also of future ones")
    products: list[ProductKeyText] | None = Field(None, max_length=1000, description="messages of these products")
    topic: Text | None = Field(None, description="an MQTT filter that narrows what devices report; empty: none")
    kinds: list[Kind] | None = Field(None, max_length=10)
    ack_wait: Number | None = Field(None, description="seconds; 30 unless given")
    tries: Integer | None = Field(None, description="16 unless given")
    apps: list[NameText] | None = Field(None, max_length=100, description="who may consume it over AMQP")
    webhook: NewWebhook | None = None
    paused: StrictBool | None = None

    @model_validator(mode="after")
    def _one_choice(self) -> Self:
        if self.all_products and self.products:
            raise ValueError("products names products, allProducts takes them all: one of them is wanted")
        return self

    def applied(self, plan: Plan) -> Plan:
        """`plan` with what was given; webhook: null takes it away."""
        given: dict[str, Any] = {
            name: value
            for name in ("topic", "ack_wait", "tries", "paused")
            if (value := getattr(self, name)) is not None
        }
        if self.all_products:
            given["products"] = None
        elif self.products is not None:
            given["products"] = tuple(map(ProductKey, dict.fromkeys(self.products)))
        elif self.all_products is False and plan.products is None:
            raise Rejected("which products, if not all? products names them")
        if self.kinds is not None:
            given["kinds"] = frozenset(self.kinds)
        if self.apps is not None:
            given["apps"] = tuple(dict.fromkeys(self.apps))
        if "webhook" in self.model_fields_set:
            given["webhook"] = self.webhook.webhook() if self.webhook else None
        return replace(plan, **given)


class NewGroup(_GroupFacts):
    name: NameText = Field(description="1 to 64 letters, digits and - _ .; its consumerGroupId")
    start: Moment | None = Field(None, description="messages stored from then on; null: from now on")

    def plan(self) -> Plan:
        """Raise Rejected when it is not said which messages it takes."""
        if not self.all_products and not self.products:
            raise Rejected("which messages? products names products, or allProducts is true")
        return self.applied(Plan())


class GroupChange(_GroupFacts):
    """What is left out stays."""


class GroupReset(_Given):
    start: Moment | None = Field(description="it gets messages stored from then on; null: from now on")


class DeadLetterDocument(_Document):
    """A message that the group did not accept; `time` is when it was given up."""

    number: str
    time: int
    tries: int
    reason: str
    message: MessageDocument

    @classmethod
    def of(cls, letter: DeadLetter) -> Self:
        return cls(
            number=str(letter.number),
            time=letter.at,
            tries=letter.tries,
            reason=letter.reason,
            message=MessageDocument.of(letter.message),
        )


class DeadLetters(_Given):
    numbers: Numbers


class DeadLettersOrAll(_Given):
    numbers: Numbers | None = None
    all: StrictBool = False

    @model_validator(mode="after")
    def _one_choice(self) -> Self:
        if self.all == bool(self.numbers):
            raise ValueError("give numbers, or all: true")
        return self


class Counted(_Document):
    count: int


class TrialDocument(_Document):
    """What became of a sample event: HTTP status, 0 without an answer; `fault` is empty when it was accepted."""

    status: int
    fault: str
    text: str = Field(description="how the answer's text begins")
    seconds: float

    @classmethod
    def of(cls, trial: Trial) -> Self:
        return cls(**trial.document())


class KeyDocument(_Document):
    name: str
    scope: Scope
    hint: str = Field(description="how the key begins")
    create_time: int
    last_used: int | None

    @classmethod
    def of(cls, key: ApiKey) -> Self:
        return cls(name=key.name, scope=key.scope, hint=key.hint, create_time=key.created, last_used=key.last_used)


class KeyWithSecret(KeyDocument):
    key: str = Field(description="shown this once")


class NewKey(_Given):
    name: NameText = Field(description="1 to 64 letters, digits and - _ .")
    scope: Scope


class UserDocument(_Document):
    name: str
    role: Role
    one_time: bool = Field(description="has to choose a password at the next sign-in")
    create_time: int
    last_sign_in: int | None

    @classmethod
    def of(cls, user: User) -> Self:
        return cls(
            name=user.name,
            role=user.role,
            one_time=user.one_time,
            create_time=user.created,
            last_sign_in=user.last_sign_in,
        )


class UserWithPassword(UserDocument):
    password: str = Field(description="one-time, shown this once")


class NewUser(_Given):
    name: NameText = Field(description="1 to 64 letters, digits and - _ .")
    role: Role


class UserChange(_Given):
    role: Role


class AuditDocument(_Document):
    id: str
    time: int
    actor: str
    way: str
    address: str
    action: str
    target: str
    detail: str

    @classmethod
    def of(cls, entry: AuditEntry) -> Self:
        return cls(
            id=str(entry.id),
            time=entry.at,
            actor=entry.actor.name,
            way=entry.actor.way,
            address=entry.actor.address,
            action=entry.action,
            target=entry.target,
            detail=entry.detail,
        )


class JobDocument(_Document):
    id: str
    kind: str
    target: str
    by: str
    state: JobState
    done: int
    total: int | None
    unit: str
    result: dict[str, Any]
    fault: str
    begin_time: int
    end_time: int | None

    @classmethod
    def of(cls, job: Job, scope: Scope = Scope.OPERATE) -> Self:
        """As somebody with `scope` may see it: bad rows are shown as they came, a secret in the wrong column with them."""
        may_see = scope.covers(Scope.OPERATE)
        return cls(
            id=job.id,
            kind=job.kind,
            target=job.target,
            by=job.by,
            state=job.state,
            done=job.done,
            total=job.total,
            unit=job.unit,
            result=job.result if may_see else {name: value for name, value in job.result.items() if name != "bad"},
            fault=job.fault,
            begin_time=job.begun,
            end_time=job.ended,
        )


class SettingDocument(_Document):
    name: str
    value: str
    description: str


class StatsDocument(_Document):
    """`now` is what happened in the last second; `messages` and `bytes` are what is stored, null while the engine is away;
    `refused` counts the refusals of the last hour by code."""

    version: str
    started: int
    devices: CensusDocument
    now: dict[str, Any]
    refused: dict[str, int]
    messages: int | None
    bytes: int | None
    engine: bool
    worker_restarts: int
    engine_restarts: int
    handshakes: dict[str, int] = Field(
        description="TLS handshakes completed since the start, by version and key exchange"
    )
    handshake_failures: dict[str, int] = Field(description="TLS handshakes that failed since the start, by reason")


class ToExamine(_Given):
    text: str = Field(max_length=64 * 1024, description="what the device sends; a curl command will do")
    secret: Text | None = Field(None, description="a DeviceSecret to check with, instead of the registered one")


class FindingDocument(_Document):
    kind: str
    good: bool
    text: str
    text_zh: str


class ExaminationDocument(_Document):
    """`matches` is null where there is nothing to compare; `firstDifference` counts from 0."""

    source: str
    product_key: str
    device_name: str
    client_id: str
    method: str
    content: str
    members: list[tuple[str, str]]
    given: str
    expected: str
    matches: bool | None
    first_difference: int | None
    skew_ms: int | None
    findings: list[FindingDocument]

    @classmethod
    def of(cls, examined: Examined) -> Self:
        return cls(
            source=examined.source,
            product_key=examined.product_key,
            device_name=examined.device_name,
            client_id=examined.client_id,
            method=examined.method,
            content=examined.content,
            members=list(examined.members),
            given=examined.given,
            expected=examined.expected,
            matches=examined.matches,
            first_difference=examined.first_difference,
            skew_ms=examined.skew_ms,
            findings=[
                FindingDocument(kind=each.kind, good=each.good, text=each.text, text_zh=each.text_zh)
                for each in examined.findings
            ],
        )
