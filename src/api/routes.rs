//! All routes in one table, with what each asks of its callers, and the layers around them.

use std::{any::Any, sync::Arc};

use axum::{
    Router,
    extract::DefaultBodyLimit,
    handler::Handler,
    http::Method,
    middleware::{from_fn, from_fn_with_state},
    response::{IntoResponse, Response},
    routing::{MethodFilter, MethodRouter, get, on},
};
use tower_http::catch_panic::CatchPanicLayer;

use super::{
    ApiError, ApiOptions, AppState, access,
    access::Need::{self, Admin, Key, Nothing},
    admin, cartridges, chat, completions, cors, demo, health, metrics, models, request_id,
    tokenize,
};
use crate::limits;

/// A line of the table.
#[derive(Debug, Clone, PartialEq)]
pub struct Route {
    pub method: Method,
    /// A pattern: `{name}` is one part of a path, `{*name}` the rest of it.
    pub path: String,
    pub need: Need,
}

struct Row {
    route: Route,
    handler: MethodRouter<Arc<AppState>>,
}

/// A GET route answers HEAD too.
fn row<H, T>(need: Need, method: Method, path: impl Into<String>, handler: H) -> Row
where
    H: Handler<T, Arc<AppState>>,
    T: 'static,
{
    let handler = match MethodFilter::try_from(method.clone()) {
        Ok(_) if method == Method::GET => get(handler),
        Ok(filter) => on(filter, handler),
        // Not one of the nine methods: it could never be asked for.
        Err(_) => MethodRouter::new(),
    };
    Row { route: Route { method, path: path.into(), need }, handler }
}

fn table(options: &ApiOptions) -> Vec<Row> {
    let mut rows = vec![
        row(Nothing, Method::GET, "/ping", health::ping),
        row(Nothing, Method::GET, "/health", health::ready),
        row(Nothing, Method::GET, "/health/live", health::live),
        row(Nothing, Method::GET, "/health/ready", health::ready),
        row(Key, Method::GET, "/metrics", metrics::render),
        row(Key, Method::GET, "/v1/models", models::list),
        row(Key, Method::GET, "/v1/models/{*id}", models::one),
        row(Key, Method::GET, "/v1/cartridges", cartridges::list),
        row(Key, Method::GET, "/v1/cartridges/{*id}", cartridges::one),
        row(Key, Method::POST, "/tokenize", tokenize::tokenize),
        row(Key, Method::POST, "/detokenize", tokenize::detokenize),
    ];
    // Their bodies are files, with limits of their own.
    for row_of_file in [
        row(Admin, Method::POST, "/v1/cartridges", admin::upload),
        row(Admin, Method::PUT, "/v1/cartridges/{*id}", admin::put),
    ] {
        let handler = row_of_file.handler.layer(DefaultBodyLimit::disable());
        rows.push(Row { handler, ..row_of_file });
    }
    rows.push(row(Admin, Method::POST, "/v1/cartridges/{*id}", admin::act));
    rows.push(row(Admin, Method::DELETE, "/v1/cartridges/{*id}", admin::delete));
    // Those of successive Tokasaurus versions; every generation route takes `cartridges`, so they are names for
    // the same handlers.
    for prefix in ["/v1", "/v1/cartridge", "/custom/cartridge"] {
        let path = |name: &str| format!("{prefix}/{name}");
        rows.push(row(Key, Method::POST, path("chat/completions"), chat::completions));
        rows.push(row(Key, Method::POST, path("completions"), completions::completions));
    }
    if options.demo_requests {
        rows.push(row(Key, Method::GET, "/demo/{document}/request", demo::request));
    }
    rows
}

/// The routes of a server with these options.
pub fn routes(options: &ApiOptions) -> Vec<Route> {
    table(options).into_iter().map(|row| row.route).collect()
}

/// All routes behind their gate. What is in no route needs a key too: it is told nothing without one.
pub fn router(state: Arc<AppState>) -> Router {
    let mut router = Router::new();
    let mut open = Vec::new();
    for Row { route, handler } in table(&state.options) {
        let handler = match route.need {
            Need::Nothing => {
                open.push(route.path.clone());
                handler
            }
            Need::Key => handler,
            Need::Admin => {
                handler.route_layer(from_fn_with_state(Arc::clone(&state), access::require_admin))
            }
        };
        router = router.route(&route.path, handler);
    }
    let gate = (Arc::clone(&state), Arc::from(open));
    router = router
        .method_not_allowed_fallback(async || ApiError::method_not_allowed())
        .fallback(async || ApiError::not_found("there is no such route"))
        .layer(DefaultBodyLimit::max(limits::MAX_BODY_BYTES))
        .layer(from_fn_with_state(gate, access::authenticate))
        .layer(CatchPanicLayer::custom(on_panic))
        .layer(from_fn_with_state(Arc::clone(&state), metrics::count))
        .layer(from_fn(request_id::attach));
    if let Some(cors) = cors::layer(&state.options.cors_origins) {
        router = router.layer(cors);
    }
    router.with_state(state)
}

/// A bug must not look like a broken connection. The panic itself is logged by the panic hook.
fn on_panic(_: Box<dyn Any + Send>) -> Response {
    ApiError::internal("the server failed on this request").into_response()
}
