"""Ready-made programs for a device: it signs in, reports once, and prints what came back.

Each is complete and holds the DeviceSecret (that for mosquitto a sign of it), so whoever may see it may act as the device.
"""

from __future__ import annotations

import shlex
import string
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from urllib.parse import quote, urlsplit

from uplinkd.core import signature
from uplinkd.core.errors import Rejected

__all__ = ["LANGUAGES", "Place", "c", "curl", "mosquitto", "python"]

_PAYLOAD = '{"on":true}'


@dataclass(frozen=True, slots=True)
class Place:
    """Where a device finds the server: `url` such as https://iot.example.com:8443, the MQTT door (port 0: there is none), and the
    path of the CA to trust, empty where the certificate is publicly trusted."""

    url: str
    mqtt_host: str
    mqtt_port: int
    ca: str


def curl(device_product: str, device_name: str, secret: str, place: Place, *, topic: str, now: int) -> str:
    """A script for bash with curl and openssl. The device's names are those that the registry lets in; `now` is ms."""
    trust = f" --cacert {shlex.quote(place.ca)}" if place.ca else ""
    return f"""\
# {_title(device_product, device_name, now)} Needs bash, curl and openssl.
# It holds the DeviceSecret: keep it to yourself. The parentheses keep a failure from closing the shell it is pasted into.
(
set -euo pipefail
url={shlex.quote(_base(place))}
product={shlex.quote(device_product)}
device={shlex.quote(device_name)}
secret={shlex.quote(secret)}
client={shlex.quote(_client_id(device_product, device_name))}
payload={shlex.quote(_PAYLOAD)}
post() {{ curl -sS --max-time 10{trust} -X POST "$@"; }}

# The content: all members but sign and signmethod, sorted by name, names and values without separators.
timestamp=$(date +%s)000
content="clientId${{client}}deviceName${{device}}productKey${{product}}timestamp${{timestamp}}"
sign=$(printf %s "$content" | openssl dgst -sha256 -hmac "$secret" | sed 's/^.* //')
body='{{"clientId":"'$client'","deviceName":"'$device'","productKey":"'$product'","timestamp":"'$timestamp'","signmethod":"hmacsha256","sign":"'$sign'"}}'

answer=$(post -H 'Content-Type: application/json' -d "$body" "$url/auth")
token=$(printf %s "$answer" | sed -n 's/.*"token":"\\([^"]*\\)".*/\\1/p')
if [ -z "$token" ]; then echo "not let in: $answer" >&2; exit 1; fi

# The token holds for days: a device keeps it, and signs in again when it is answered 20001.
post -H "password: $token" -H 'Content-Type: application/octet-stream' --data-binary "$payload" "$url"{shlex.quote(_path(topic))}
echo
)
"""


def python(device_product: str, device_name: str, secret: str, place: Place, *, topic: str, now: int) -> str:
    """A program for Python 3, standard library alone. Names and `now` as for `curl`."""
    parts = urlsplit(_base(place))
    if parts.scheme == "https":
        context = f"ssl.create_default_context(cafile={place.ca!r})" if place.ca else "ssl.create_default_context()"
        connection = (
            f"http.client.HTTPSConnection({parts.hostname!r}, {parts.port or 443}, timeout=10, context={context})"
        )
    else:
        connection = f"http.client.HTTPConnection({parts.hostname!r}, {parts.port or 80}, timeout=10)"
    return f"""\
# {_title(device_product, device_name, now)} Standard library alone.
# It holds the DeviceSecret: keep it to yourself.
import hashlib
import hmac
import http.client
import json
{"import ssl" + chr(10) if parts.scheme == "https" else ""}import sys
import time

SECRET = {secret!r}
connection = {connection}


def post(path, headers, body):
    connection.request("POST", path, body, headers)
    answer = json.loads(connection.getresponse().read().decode())
    if answer["code"] != 0:
        sys.exit("refused: %s" % answer)
    return answer["info"]


login = {{
    "productKey": {device_product!r},
    "deviceName": {device_name!r},
    "clientId": {_client_id(device_product, device_name)!r},
    "timestamp": str(int(time.time() * 1000)),
}}
# The content: all members but sign and signmethod, sorted by name, names and values without separators.
content = "".join(name + login[name] for name in sorted(login))
login["sign"] = hmac.new(SECRET.encode(), content.encode(), hashlib.sha256).hexdigest()
login["signmethod"] = "hmacsha256"
token = post("/auth", {{"Content-Type": "application/json"}}, json.dumps(login).encode())["token"]

# The token holds for days: a device keeps it, and signs in again when it is answered 20001.
headers = {{"Content-Type": "application/octet-stream", "password": token}}
info = post({_path(topic)!r}, headers, {_PAYLOAD.encode()!r})
print("stored as messageId", info["messageId"])
if "data" in info:
    print("a message for the device:", info["topic"], info["data"])
"""


def c(device_product: str, device_name: str, secret: str, place: Place, *, topic: str, now: int) -> str:
    """One file of C99 against libcurl and OpenSSL. Names and `now` as for `curl`."""
    trust = f"    curl_easy_setopt(curl, CURLOPT_CAINFO, {_c_text(place.ca)});\n" if place.ca else ""
    return f"""\
/* {_title(device_product, device_name, now)}
 * Compile: cc -std=c99 -Wall -Wextra -o report report.c -lcurl -lcrypto
 * (Debian: apt-get install gcc libcurl4-openssl-dev libssl-dev)
 * It holds the DeviceSecret: keep it to yourself. */
#define _POSIX_C_SOURCE 200809L
#include <curl/curl.h>
#include <openssl/hmac.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#define URL {_c_text(_base(place))}
#define PRODUCT {_c_text(device_product)}
#define DEVICE {_c_text(device_name)}
#define SECRET {_c_text(secret)}
#define CLIENT {_c_text(_client_id(device_product, device_name))}
#define PAYLOAD {_c_text(_PAYLOAD)}

struct answer {{
    char text[4096];
    size_t length;
}};

static size_t take(char *data, size_t size, size_t count, void *to)
{{
    struct answer *answer = to;
    size_t length = size * count;
    if (length >= sizeof answer->text - answer->length)
        return 0;
    memcpy(answer->text + answer->length, data, length);
    answer->length += length;
    answer->text[answer->length] = 0;
    return length;
}}

/* Posts `body` and leaves the server's JSON in `answer`; 0 when it said yes (code 0). */
static int post(CURL *curl, const char *url, const char *type, const char *password, const char *body,
                struct answer *answer)
{{
    struct curl_slist *headers = curl_slist_append(NULL, type);
    if (password)
        headers = curl_slist_append(headers, password);
    answer->length = 0;
    answer->text[0] = 0;
    curl_easy_setopt(curl, CURLOPT_URL, url);
    curl_easy_setopt(curl, CURLOPT_HTTPHEADER, headers);
    curl_easy_setopt(curl, CURLOPT_POSTFIELDSIZE, (long)strlen(body));
    curl_easy_setopt(curl, CURLOPT_POSTFIELDS, body);
    curl_easy_setopt(curl, CURLOPT_WRITEFUNCTION, take);
    curl_easy_setopt(curl, CURLOPT_WRITEDATA, answer);
    curl_easy_setopt(curl, CURLOPT_TIMEOUT, 10L);
{trust}    CURLcode result = curl_easy_perform(curl);
    curl_slist_free_all(headers);
    if (result != CURLE_OK) {{
        fprintf(stderr, "%s: %s\\n", url, curl_easy_strerror(result));
        return 1;
    }}
    if (!strstr(answer->text, "\\"code\\":0,")) {{
        fprintf(stderr, "refused: %s\\n", answer->text);
        return 1;
    }}
    return 0;
}}

int main(void)
{{
    static struct answer answer;
    char content[512], body[1024], password[512] = "password: ";
    unsigned char digest[EVP_MAX_MD_SIZE];
    unsigned int size = 0;
    char sign[2 * EVP_MAX_MD_SIZE + 1];
    struct timespec now;

    clock_gettime(CLOCK_REALTIME, &now);
    long long timestamp = (long long)now.tv_sec * 1000 + now.tv_nsec / 1000000;

    /* The content: all members but sign and signmethod, sorted by name, names and values without separators. */
    snprintf(content, sizeof content, "clientId%sdeviceName%sproductKey%stimestamp%lld", CLIENT, DEVICE, PRODUCT,
             timestamp);
    HMAC(EVP_sha256(), SECRET, (int)strlen(SECRET), (const unsigned char *)content, strlen(content), digest, &size);
    for (unsigned int i = 0; i < size; i++)
        sprintf(sign + 2 * i, "%02x", digest[i]);
    snprintf(body, sizeof body,
             "{{\\"clientId\\":\\"%s\\",\\"deviceName\\":\\"%s\\",\\"productKey\\":\\"%s\\",\\"timestamp\\":\\"%lld\\","
             "\\"signmethod\\":\\"hmacsha256\\",\\"sign\\":\\"%s\\"}}",
             CLIENT, DEVICE, PRODUCT, timestamp, sign);

    curl_global_init(CURL_GLOBAL_DEFAULT);
    CURL *curl = curl_easy_init();
    if (!curl || post(curl, URL "/auth", "Content-Type: application/json", NULL, body, &answer))
        return 1;
    char *token = strstr(answer.text, "\\"token\\":\\"");
    char *end = token ? strchr(token + 9, '"') : NULL;
    if (!end || end - token > 400)
        return 1;
    strncat(password, token + 9, (size_t)(end - token - 9));

    /* The token holds for days: a device keeps it, and signs in again when it is answered 20001. */
    if (post(curl, URL {_c_text(_path(topic))}, "Content-Type: application/octet-stream", password, PAYLOAD, &answer))
        return 1;
    long long message = 0;
    char *id = strstr(answer.text, "\\"messageId\\":");
    if (!id || sscanf(id + 12, "%lld", &message) != 1)
        return 1;
    printf("stored as messageId %lld\\n", message);
    curl_easy_cleanup(curl);
    curl_global_cleanup();
    return 0;
}}
"""


def mosquitto(device_product: str, device_name: str, secret: str, place: Place, *, topic: str, now: int) -> str:
    """A command line of mosquitto_pub, version 2.0 or newer; raise Rejected where there is no MQTT door.

    The sign holds as long as the DeviceSecret does: over MQTT the timestamp, which is `now`, is not held against the clock.
    """
    if not place.mqtt_port:
        raise Rejected("the server has no MQTT door: mqtt_listen is empty")
    client = _client_id(device_product, device_name)
    members = {"clientId": client, "deviceName": device_name, "productKey": device_product, "timestamp": str(now)}
    sign = signature.sign(secret, signature.content_of(members), "hmacsha256")
    trust = ["--cafile", place.ca] if place.ca else ["--tls-use-os-certs"]
    first = ["mosquitto_pub", "-h", place.mqtt_host, "-p", str(place.mqtt_port), *trust, "-V", "mqttv311"]
    login = ["-i", f"{client}|securemode=2,signmethod=hmacsha256,timestamp={now}|"]
    login += ["-u", f"{device_name}&{device_product}", "-P", sign]
    message = ["-q", "1", "-t", topic, "-m", _PAYLOAD]
    return f"""\
# {_title(device_product, device_name, now)} Needs mosquitto-clients 2.0.
# The password is the sign; it holds as long as the DeviceSecret does: keep it to yourself.
{shlex.join(first)} \\
  {shlex.join(login)} \\
  {shlex.join(message)}
"""


LANGUAGES: dict[str, Callable[..., str]] = {"curl": curl, "python": python, "c": c, "mosquitto": mosquitto}
"""Each takes what `curl` takes."""


def _title(product: str, device: str, now: int) -> str:
    made = datetime.fromtimestamp(now / 1000, UTC).strftime("%Y-%m-%d")
    return f"Device {device} of {product} signs in and reports once; made on {made}."


def _client_id(product: str, device: str) -> str:
    return f"{product}.{device}"[:64]


def _base(place: Place) -> str:
    return place.url.rstrip("/")


def _path(topic: str) -> str:
    return "/topic" + quote(topic, safe="/@:._-")


def _c_text(text: str) -> str:
    """A C string of UTF-8. Whatever might mean something to the compiler (trigraphs too) is in octal, which ends after 3 digits."""
    plain = (string.ascii_letters + string.digits + " !#$%&'()*+,-./:;<=>@[]^_`{|}~").encode()
    return '"' + "".join(chr(byte) if byte in plain else f"\\{byte:03o}" for byte in text.encode()) + '"'
