//! Which document a path names. Owns the paths; fills no document.

use serde::Serialize;

use super::follow::Follower;
use super::http::Answer;
use super::view::View;
use super::workers::Reply;
use crate::metrics::CONTENT_TYPE;

/// What root gets for a request for this path.
pub(super) fn reply(view: &View, path: &str) -> Reply {
    let path = without_query(path);
    let from = match path.strip_prefix("/v1/events/follow") {
        Some("") => None,
        Some(rest) => match rest.strip_prefix('/').map(str::parse) {
            Some(Ok(number)) => Some(number),
            _ => return Reply::Answer(Answer::text(404, "there is no event of such a number")),
        },
        None => return Reply::Answer(answer(view, path)),
    };
    Reply::Events(Follower::new(&view.history, from))
}

fn answer(view: &View, path: &str) -> Answer {
    match path {
        "/metrics" => metrics(view),
        "/healthz" => health(view),
        "/v1/status" => json(&view.status()),
        "/v1/tasks" => json(&view.tasks()),
        "/v1/events" => json(&view.history.recent()),
        "/v1/sandboxes" => json(&view.sandboxes()),
        _ => one(view, path).unwrap_or_else(|| {
            Answer::text(
                404,
                "there are /v1/status, /v1/tasks, /v1/tasks/NAMESPACE/ID, /v1/sandboxes, \
                 /v1/sandboxes/NAMESPACE/ID, /v1/events, /v1/events/follow, \
                 /v1/events/follow/NUMBER, /metrics and /healthz",
            )
        }),
    }
}

/// Answers a request for one thing by its name; `None` for another path.
fn one(view: &View, path: &str) -> Option<Answer> {
    let (kind, name) = path.strip_prefix("/v1/")?.split_once('/')?;
    let (namespace, id) = name.split_once('/')?;
    match kind {
        "tasks" => Some(found("task", view.task(namespace, id))),
        "sandboxes" => Some(found("sandbox", view.sandbox(namespace, id))),
        _ => None,
    }
}

/// What any client gets for a request for this path.
pub(super) fn reply_to_stranger(view: &View, path: &str) -> Reply {
    Reply::Answer(match without_query(path) {
        "/metrics" => metrics(view),
        "/healthz" => health(view),
        _ => Answer::text(404, "there are /metrics and /healthz"),
    })
}

fn without_query(path: &str) -> &str {
    path.split_once('?').map_or(path, |(path, _)| path)
}

fn metrics(view: &View) -> Answer {
    let Some(metrics) = view.metrics() else {
        return Answer::text(503, "the daemon starts");
    };
    match metrics.text(&view.status()) {
        Ok(text) => Answer {
            status: 200,
            content_type: CONTENT_TYPE,
            body: text.into_bytes(),
        },
        Err(error) => Answer::text(503, &format!("cannot write the metrics: {error}")),
    }
}

fn health(view: &View) -> Answer {
    if view.status().problems.is_empty() {
        Answer::text(200, "ok")
    } else {
        Answer::text(503, "something needs attention: see `embedshimd status`")
    }
}

fn found(what: &str, detail: Option<impl Serialize>) -> Answer {
    match detail {
        Some(detail) => json(&detail),
        None => Answer::text(404, &format!("there is no such {what}")),
    }
}

fn json(document: &impl Serialize) -> Answer {
    match serde_json::to_vec(document) {
        Ok(body) => Answer {
            status: 200,
            content_type: "application/json",
            body,
        },
        Err(error) => Answer::text(503, &format!("cannot write the document: {error}")),
    }
}
