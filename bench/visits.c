/* Devices that come and go, or come and stay: what wrk cannot do. Compiled and run by bench.visits.

   visits PORT SECONDS CONNECTIONS LOGINS fixed   TLS handshake, one request, its answer, close
   visits PORT SECONDS CONNECTIONS LOGINS device  TLS handshake, /auth, one report with the token just got, close
   visits PORT SECONDS CONNECTIONS LOGINS stay    TLS handshake, /auth, then one report after the other, each connection its own device
                                                  from first to last: wrk deals its requests out in the order in which answers come
   visits PORT 0       CONNECTIONS LOGINS hold    TLS handshake, /auth, then rest: says HELD 1, waits for a line, opens the others,
                                                  says HELD <count>, rests until its standard input ends

   A line of LOGINS is the path of a report, a tab, the body of a login. No session is resumed. The server's certificate is not
   checked against a root (its signature is): the load's core is the scarce one. The last line is RESULT as count.lua prints it, in
   which the latencies are those of whole visits, or of reports where connections stay; what ends after SECONDS is not counted. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <openssl/ssl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

enum { ROOM = 8192, TOKEN = 2048, PAYLOAD = 200, AT_ONCE = 64, A_SOURCE = 4000, SOURCES = 200 };
enum stage { CONNECTING, HANDSHAKE, ASKING, READING, ENDING, RESTING, GONE };

struct visit {
  int fd, number, asked, out, got, writing;
  enum stage stage;
  SSL *ssl;
  long long began;
  char *buffer, *report;
  int size;
};

static char **paths, **logins;
static int known, port, hold, device, stay, poll_fd, opened, held;
static SSL_CTX *context;
static long long good, bad, errors, end_at;
static unsigned *took;
static size_t took_count, took_room;
static char sample[300], answer[ROOM + 1], request[ROOM];

static long long now(void) {
  struct timespec at;
  clock_gettime(CLOCK_MONOTONIC, &at);
  return at.tv_sec * 1000000LL + at.tv_nsec / 1000;
}

static void die(const char *what) {
  fprintf(stderr, "visits: %s: %s\n", what, strerror(errno));
  exit(1);
}

static void watch(struct visit *one, int how, unsigned events) {
  struct epoll_event event = {.events = events, .data.ptr = one};
  if (epoll_ctl(poll_fd, how, one->fd, &event)) die("epoll_ctl");
  one->writing = !!(events & EPOLLOUT);
}

static void begin(struct visit *one) {
  struct sockaddr_in from = {.sin_family = AF_INET}, to = {.sin_family = AF_INET, .sin_port = htons(port)};
  int yes = 1;
  one->number = opened++;
  one->asked = one->out = one->got = 0;
  one->stage = CONNECTING;
  one->began = now();
  one->ssl = NULL;
  free(one->report);
  one->report = NULL;
  one->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
  if (one->fd < 0) die("socket");
  setsockopt(one->fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
  setsockopt(one->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &yes, sizeof yes);
  /* Several sources, since one has some 28,000 ports for one address. */
  from.sin_addr.s_addr = htonl(0x7f000002 + one->number / A_SOURCE % SOURCES);
  to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (bind(one->fd, (struct sockaddr *)&from, sizeof from)) die("bind");
  if (connect(one->fd, (struct sockaddr *)&to, sizeof to) && errno != EINPROGRESS) die("connect");
  watch(one, EPOLL_CTL_ADD, EPOLLOUT);
}

static void leave(struct visit *one, int peaceful) {
  if (!peaceful) errors++;
  if (one->ssl) SSL_free(one->ssl);
  close(one->fd);
  one->ssl = NULL;
  one->stage = GONE;
  if (!hold && now() < end_at) begin(one);
}

static void wrong(const char *what) {
  bad++;
  snprintf(sample, sizeof sample, "%.200s", what);
}

/* The request to send next, into `request`; its size. */
static int compose(struct visit *one) {
  int place = one->number % known;
  if (one->report) return memcpy(request, one->report, one->size), one->size;
  if (one->asked == 0 && (device || hold || stay))
    return snprintf(request, sizeof request,
                    "POST /auth HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s",
                    strlen(logins[place]), logins[place]);
  char token[TOKEN + 1] = "none", *from = device || stay ? strstr(one->buffer, "\"token\":\"") : NULL;
  if (from) sscanf(from + 9, "%2048[^\"]", token);
  int head = snprintf(request, sizeof request - PAYLOAD,
                      "POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/octet-stream\r\npassword: %s\r\n"
                      "%sContent-Length: %d\r\n\r\n",
                      paths[place], token, stay ? "" : "Connection: close\r\n", PAYLOAD);
  memset(request + head, 'x', PAYLOAD);
  if (stay) one->report = memcpy(malloc(head + PAYLOAD), request, one->size = head + PAYLOAD);
  return head + PAYLOAD;
}

static void ask(struct visit *one) {
  one->out = compose(one);
  one->got = 0;
  one->stage = ASKING;
  one->asked++;
}

/* A visit, or a report, has ended well. */
static void count(struct visit *one, long long at) {
  if (at >= end_at) return;
  good++;
  if (took_count == took_room && !(took = realloc(took, sizeof *took * (took_room = took_room * 2 + 4096)))) die("realloc");
  took[took_count++] = at - one->began;
}

/* Whether the answer is there in whole: 1, with the body checked. */
static int whole(struct visit *one) {
  one->buffer[one->got] = 0;
  char *body = strstr(one->buffer, "\r\n\r\n"), *length = strcasestr(one->buffer, "\ncontent-length:");
  if (!body || !length || length > body) return 0;
  body += 4;
  if (one->got - (body - one->buffer) < atoi(length + 16)) return 0;
  if (strncmp(one->buffer + 9, "200", 3) || !strstr(body, "\"code\":0")) {
    snprintf(answer, sizeof answer, "%.3s %s", one->buffer + 9, body);
    wrong(answer);
  }
  return 1;
}

static void step(struct visit *one) {
  for (;;) {
    int done = 0;
    switch (one->stage) {
    case CONNECTING: {
      int fault = 0;
      socklen_t size = sizeof fault;
      getsockopt(one->fd, SOL_SOCKET, SO_ERROR, &fault, &size);
      if (fault) return leave(one, 0);
      one->ssl = SSL_new(context);
      SSL_set_tlsext_host_name(one->ssl, "localhost");
      SSL_set_fd(one->ssl, one->fd);
      SSL_set_connect_state(one->ssl);
      one->stage = HANDSHAKE;
      continue;
    }
    case HANDSHAKE:
      done = SSL_do_handshake(one->ssl);
      if (done == 1) {
        ask(one);
        continue;
      }
      break;
    case ASKING: /* A request fits the socket's buffer. */
      done = SSL_write(one->ssl, request, one->out);
      if (done > 0) {
        one->stage = READING;
        continue;
      }
      break;
    case READING:
      done = SSL_read(one->ssl, one->buffer + one->got, ROOM - one->got);
      if (done > 0) {
        one->got += done;
        if (one->got == ROOM) return leave(one, 0);
        if (!whole(one)) continue;
        if (hold) {
          one->stage = RESTING;
          held++;
          free(one->buffer);
          one->buffer = NULL;
          return;
        }
        if (stay) {
          long long at = now();
          if (one->asked > 1) count(one, at);
          if (at >= end_at) return leave(one, 1);
          one->began = at;
        }
        if (!stay && one->asked == 1 + device) {
          one->stage = ENDING;
          continue;
        }
        ask(one);
        continue;
      }
      break;
    case ENDING: {
      char rest[64];
      done = SSL_read(one->ssl, rest, sizeof rest);
      if (done > 0) continue;
      break;
    }
    default: /* A server that ends what rests, or the tickets that come late. */
      return;
    }
    int why = SSL_get_error(one->ssl, done);
    if (why == SSL_ERROR_WANT_READ || why == SSL_ERROR_WANT_WRITE) {
      int writing = why == SSL_ERROR_WANT_WRITE;
      if (writing != one->writing) watch(one, EPOLL_CTL_MOD, writing ? EPOLLOUT : EPOLLIN);
      return;
    }
    if (one->stage != ENDING) return leave(one, 0);
    count(one, now());
    return leave(one, 1);
  }
}

static int by_size(const void *one, const void *other) {
  unsigned left = *(const unsigned *)one, right = *(const unsigned *)other;
  return (left > right) - (left < right);
}

int main(int words_count, char **words) {
  if (words_count != 6) return fprintf(stderr, "visits PORT SECONDS CONNECTIONS LOGINS fixed|device|stay|hold\n"), 2;
  port = atoi(words[1]);
  double seconds = atof(words[2]);
  int connections = atoi(words[3]);
  hold = !strcmp(words[5], "hold");
  device = !strcmp(words[5], "device");
  stay = !strcmp(words[5], "stay");
  FILE *file = fopen(words[4], "r");
  if (!file) die(words[4]);
  char line[4096];
  while (fgets(line, sizeof line, file)) {
    paths = realloc(paths, sizeof *paths * (known + 1));
    logins = realloc(logins, sizeof *logins * (known + 1));
    paths[known] = strdup(strtok(line, "\t"));
    logins[known++] = strdup(strtok(NULL, "\n"));
  }
  fclose(file);
  context = SSL_CTX_new(TLS_client_method());
  SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_OFF);
  SSL_CTX_set_mode(context, SSL_MODE_RELEASE_BUFFERS);
  poll_fd = epoll_create1(0);
  struct visit *visits = calloc(connections, sizeof *visits);
  struct epoll_event events[256];
  long long began = now();
  end_at = began + (long long)(seconds * 1e6);
  int first = hold ? 1 : connections, next = 0;
  while (hold || now() < end_at) {
    while (next < first && (!hold || next - held < AT_ONCE)) {
      visits[next].buffer = malloc(ROOM + 1);
      begin(&visits[next++]);
    }
    int found = epoll_wait(poll_fd, events, 256, 100);
    for (int each = 0; each < found; each++) {
      struct visit *one = events[each].data.ptr;
      if (one->stage != GONE) step(one);
    }
    if (hold && (bad || errors)) break;
    if (hold && held == first) {
      printf("HELD %d\n", held);
      fflush(stdout);
      if (!fgets(line, sizeof line, stdin) || held == connections) return 0;
      first = connections;
    }
  }
  double micros = now() - began;
  qsort(took, took_count, sizeof *took, by_size);
  printf("RESULT %lld %lld %.0f %u %u %lld %s\n", good, bad, micros, took_count ? took[took_count / 2] : 0,
         took_count ? took[took_count * 99 / 100] : 0, errors, sample);
  return hold;
}
