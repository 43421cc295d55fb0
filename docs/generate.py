"""Writes the tables of codes and settings into the documents, from the program's own: `make docs`.

A table stands between `<!-- codes -->` and `<!-- /codes -->` (or settings). tests/core/test_docs.py fails when one is stale.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from uplinkd.core.errors import EXPLANATIONS, MESSAGES, Code
from uplinkd.settings import Settings, shown

ROOT = Path(__file__).parent.parent
DOCUMENTS = {
    "en": [ROOT / "README.md", ROOT / "docs/en/protocol.md"],
    "zh": [ROOT / "README.zh-CN.md", ROOT / "docs/zh/protocol.md"],
}

SETTINGS_ZH = {
    "data": "存放所有状态的目录",
    "listen": "HTTPS 监听地址",
    "plain_listen": "供 TLS 终结代理使用的明文端口；留空则不开",
    "mqtt_listen": "MQTT（TLS）监听地址；留空则不开",
    "mqtt_plain_listen": "不带 TLS 的 MQTT 端口，供别无选择的设备使用，通常为 1884；留空则不开",
    "workers": "工作进程数；0 表示每个核一个",
    "database_url": "注册库；留空则为数据目录中的 SQLite",
    "nats_url": "您自己的 NATS 服务器，以逗号分隔；留空则自动启动并看护一个",
    "nats_server": "要启动的 nats-server 程序；留空则用随 uplinkd 安装的",
    "nats_listen": "应用程序连接 uplinkd 所看护的 nats-server 的地址；留空则不对应用开放",
    "secret_key": "静态加密密钥，32 字节 base64；留空则为数据目录中的文件",
    "tls_cert": "服务器证书链（PEM）；RSA 与 ECDSA 可各一张",
    "tls_key": "与 tls_cert 一一对应的私钥",
    "tls_name": "自签证书中附加的域名和地址",
    "token_ttl": "token 有效期",
    "timestamp_window": "/auth 的 timestamp 与服务器时钟的最大偏差；0 表示不校验",
    "device_rate": "单个设备每秒消息数，突发量相同；0 表示不限",
    "device_bytes": "单个设备每秒字节数，突发量相同；0 表示不限",
    "auth_rate": "单个设备每分钟鉴权次数（HTTPS 与 MQTT 合计），突发量相同；0 表示不限",
    "address_auth_rate": "单个地址每分钟被拒绝的鉴权次数，突发量相同；0 表示不限",
    "online_timeout": "通过 HTTPS 上报的设备在最后一次请求之后视为在线的时长",
    "keep_age": "消息保留时长；0 表示不限",
    "keep_bytes": "消息保留的总大小，先删最旧的",
    "down_age": "下行消息等待设备的最长时间，也是持久 MQTT 会话的保留时长",
    "down_limit": "每台设备最多等待的下行消息数，再多则丢弃最旧的",
    "publish_timeout": "等待消息引擎的最长时间，之后拒绝上报",
    "log_age": "拒绝记录保留时长",
    "log_entries": "拒绝记录保留条数，先删最旧的",
    "head_timeout": "请求头到齐的最长时间",
    "body_timeout": "请求体到齐的最长时间",
    "idle_timeout": "空闲连接的保留时长",
    "max_connections": "每个工作进程的连接数上限，超出的立即关闭",
    "access_log": "成功的请求也写日志，每个请求一行",
}


def codes(language: str) -> str:
    """The table of business codes."""
    headings = {"en": ("code", "message", "what it means", "what to do"), "zh": ("code", "message", "含义", "处理办法")}
    rows = []
    for code in Code:
        words = EXPLANATIONS[code]
        means, do = (words.means, words.do) if language == "en" else (words.means_zh, words.do_zh)
        rows.append((str(int(code)), MESSAGES[code], means, do))
    return _table(headings[language], rows)


def settings(language: str) -> str:
    """The table of settings with their defaults."""
    headings = {"en": ("setting", "default", "what it is"), "zh": ("设置", "默认值", "说明")}
    defaults = Settings()
    rows = []
    for name, info in Settings.model_fields.items():
        what = info.description or "" if language == "en" else SETTINGS_ZH[name]
        value = shown(defaults, name)
        rows.append((f"`{name}`", f"`{value}`" if value else "", what))
    return _table(headings[language], rows)


def render(text: str, language: str) -> str:
    """`text` with its tables as they should be."""
    for name, table in (("codes", codes), ("settings", settings)):
        block = f"<!-- {name} -->\n{table(language)}\n<!-- /{name} -->"
        before, mark, rest = text.partition(f"<!-- {name} -->")
        if mark:
            after = rest.partition(f"<!-- /{name} -->")[2] if f"<!-- /{name} -->" in rest else rest
            text = before + block + after
    return text


def _table(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [headings, tuple("---" for _ in headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    for language, documents in DOCUMENTS.items():
        for document in documents:
            document.write_text(render(document.read_text(), language))


if __name__ == "__main__":
    main()
