// Swagger UI over the API's own description; a signed-in browser may try what it reads.
const theme = document.documentElement.dataset.theme;
const dark = theme === "dark" || (theme === "auto" && matchMedia("(prefers-color-scheme: dark)").matches);
document.documentElement.classList.toggle("dark-mode", dark);

window.addEventListener("load", () => {
  const csrf = document.body.dataset.csrf;
  window.SwaggerUIBundle({
    url: "/api/v1/openapi.json",
    dom_id: "#swagger",
    docExpansion: "list",
    deepLinking: true,
    requestInterceptor: (request) => {
      if (csrf) request.headers["X-CSRF-Token"] = csrf;
      return request;
    },
  });
});
