// /docs: Swagger UI, with the key of this tab, if there is one, for what is tried out.
window.SwaggerUIBundle({
  url: "/page/openapi.json",
  dom_id: "#api",
  deepLinking: false, // else there are links inside of buttons
  docExpansion: "list",
  defaultModelsExpandDepth: -1,
  tryItOutEnabled: false,
  displayRequestDuration: true,
  persistAuthorization: false,
  requestInterceptor: (request) => {
    const key = sessionStorage.getItem("api-key");
    if (key) request.headers.Authorization ??= `Bearer ${key}`;
    return request;
  },
});
