"""The one table of codes, and the three ways to fail: Refused, Unavailable, or a bug of ours."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

__all__ = [
    "EXPLANATIONS",
    "LIMITS",
    "MESSAGES",
    "Code",
    "Conflict",
    "Explanation",
    "NotFound",
    "Refused",
    "Rejected",
    "Stale",
    "Unavailable",
]


class Code(IntEnum):
    """Business codes of the device protocol; the numbers and messages are the platform's, word for word."""

    SUCCESS = 0
    COMMON_ERROR = 10000
    PARAM_ERROR = 10001
    AUTH_CHECK_ERROR = 20000
    TOKEN_IS_EXPIRED = 20001
    TOKEN_IS_NULL = 20002
    CHECK_TOKEN_ERROR = 20003
    UPDATE_SESSION_ERROR = 20004
    PUBLISH_MESSAGE_ERROR = 30001
    REQUEST_TOO_MANY = 40000


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a code means and what the device's maker does about it, in English and Chinese."""

    means: str
    do: str
    means_zh: str
    do_zh: str


MESSAGES: dict[Code, str] = {
    Code.SUCCESS: "success",
    Code.COMMON_ERROR: "common error",
    Code.PARAM_ERROR: "param error",
    Code.AUTH_CHECK_ERROR: "auth check error",
    Code.TOKEN_IS_EXPIRED: "token is expired",
    Code.TOKEN_IS_NULL: "token is null",
    Code.CHECK_TOKEN_ERROR: "check token error",
    Code.UPDATE_SESSION_ERROR: "update session error",
    Code.PUBLISH_MESSAGE_ERROR: "publish message error",
    Code.REQUEST_TOO_MANY: "request too many",
}

LIMITS = (
    "device_rate",
    "device_bytes",
    "product_rate",
    "product_bytes",
    "address_rate",
    "auth_rate",
    "address_auth_rate",
)
"""What a refusal with 40000 may go by, each the name of a setting."""

EXPLANATIONS: dict[Code, Explanation] = {
    Code.SUCCESS: Explanation(
        "Done; a message is stored.",
        "Nothing.",
        "成功；消息已落盘存储。",
        "无需处理。",
    ),
    Code.COMMON_ERROR: Explanation(
        "An unexpected fault of the server.",
        "Retry with growing pauses; the operator finds the cause by requestId.",
        "服务器内部出现意外故障。",
        "逐步加大间隔重试；运维人员可用 requestId 查到原因。",
    ),
    Code.PARAM_ERROR: Explanation(
        "The request breaks a rule: a member missing or malformed, a wrong Content-Type, a malformed topic, a query string.",
        "Correct the request; the reason, in `uplinkd logs` or the console, names the value and the rule.",
        "请求不合规则：参数缺失或格式错误、Content-Type 错误、Topic 格式错误、带有查询串。",
        "修正请求；`uplinkd logs` 或控制台中的原因会指出具体的值和规则。",
    ),
    Code.AUTH_CHECK_ERROR: Explanation(
        "The device was not recognised: unknown, disabled, wrong sign, or a timestamp too far from the server's clock.",
        "Compare with the reason, in `uplinkd logs` or the console: it has the content that the server signed, or the clock's error.",
        "设备鉴权失败：设备不存在、已禁用、签名错误，或时间戳与服务器时钟相差过大。",
        "对照 `uplinkd logs` 或控制台中的原因：其中给出服务器参与签名的原文，或时钟偏差。",
    ),
    Code.TOKEN_IS_EXPIRED: Explanation(
        "The token is too old, or stands no longer (device disabled or deleted, secret changed, signing key rotated out).",
        "Call /auth again and repeat the request with the new token.",
        "token 已过期，或已失效（设备被禁用或删除、密钥已更换、签名密钥已轮换）。",
        "重新调用 /auth，用新 token 重发。",
    ),
    Code.TOKEN_IS_NULL: Explanation(
        "The request has no password header, or an empty one.",
        "Send `password: <token>`.",
        "请求缺少 password 头，或其值为空。",
        "携带 `password: <token>`。",
    ),
    Code.CHECK_TOKEN_ERROR: Explanation(
        "The token was not issued by this server.",
        "Call /auth on this server; check for a token that was cut short.",
        "该 token 不是本服务器签发的。",
        "在本服务器调用 /auth；检查 token 是否被截断。",
    ),
    Code.UPDATE_SESSION_ERROR: Explanation(
        "The login was right but could not be recorded: the registry is away.",
        "Retry with growing pauses; the operator looks at the registry.",
        "鉴权信息无法核对或登记：注册库暂时不可用。",
        "逐步加大间隔重试；运维人员检查注册库。",
    ),
    Code.PUBLISH_MESSAGE_ERROR: Explanation(
        "Not stored: the device may not publish to this topic, or the message engine did not take it.",
        "The reason, in `uplinkd logs` or the console, says which; for the first add a topic class, for the second retry.",
        "消息未存储：设备无权向该 Topic 发布，或消息引擎未接收。",
        "`uplinkd logs` 或控制台中的原因会说明是哪一种；前者添加 Topic 类，后者重试。",
    ),
    Code.REQUEST_TOO_MANY: Explanation(
        "Flow control: too many requests of this device, of its product or from this address, or too many refused logins.",
        "Send less often, batch, keep the token instead of authenticating anew; or raise the limit.",
        "流控：该设备、其产品或该地址的请求过多，或鉴权失败次数过多。",
        "降低频率、合并上报、缓存 token 而不要反复鉴权；或调高限额。",
    ),
}


class Refused(Exception):  # noqa: N818 - a refusal is an answer, not an error of ours
    """The device is answered no with `code`; `reason` is for the operator alone and ends the search.

    `forbidden`: it has shown who it is, and may not all the same (MQTT tells these two apart). `limit` is the setting that
    flow control went by, one of LIMITS; `wait` says for how many seconds the same will not pass either, where that is certain.
    """

    def __init__(
        self,
        code: Code,
        reason: str,
        *,
        product_key: str = "",
        device_name: str = "",
        topic: str = "",
        forbidden: bool = False,
        limit: str = "",
    ) -> None:
        super().__init__(reason)
        self.forbidden = forbidden
        self.limit = limit
        self.wait = 0.0
        self.code = code
        self.reason = reason
        self.product_key = product_key
        self.device_name = device_name
        self.topic = topic


class Unavailable(Exception):  # noqa: N818 - names what happened
    """The registry or the engine is away; the text says which and why."""


class Rejected(Exception):  # noqa: N818 - names what happened
    """An operator's input breaks a rule; the text names the value, the rule and what to do."""


class NotFound(Rejected):
    """What the operator named is not there."""


class Conflict(Rejected):
    """What the operator wants to make is there already, or something still depends on what goes."""


class Stale(Rejected):
    """What the operator wants to change was changed by somebody else since they looked."""
