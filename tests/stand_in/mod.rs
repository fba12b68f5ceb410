//! Local servers that speak the routes of the Hugging Face hub and of Weights & Biases, and misbehave on
//! demand. Everything a client sent is kept, so that tests can say what was not sent.
#![allow(dead_code, reason = "each test binary uses its share of this module")]

pub mod hub;
pub mod store_support;
pub mod wandb;

use std::{
    collections::HashMap,
    io::{BufRead, BufReader, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

/// One request as it came.
#[derive(Debug, Clone, Default)]
pub struct Asked {
    pub method: String,
    /// With the query.
    pub path: String,
    /// Names in lower case.
    pub heads: HashMap<String, String>,
    pub body: Vec<u8>,
}

impl Asked {
    pub fn head(&self, name: &str) -> Option<&str> {
        self.heads.get(name).map(String::as_str)
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }
}

/// What is answered.
#[derive(Debug, Clone)]
pub struct Answer {
    pub status: u16,
    pub heads: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self { status, heads: Vec::new(), body: body.into() }
    }

    pub fn json(value: &serde_json::Value) -> Self {
        Self::new(200, value.to_string()).with("Content-Type", "application/json")
    }

    pub fn with(mut self, name: &str, value: impl ToString) -> Self {
        self.heads.push((name.to_owned(), value.to_string()));
        self
    }
}

/// How an answer goes wrong.
#[derive(Debug, Clone)]
pub enum Trouble {
    Answer(Answer),
    /// So many bytes of the body, then the connection is cut.
    CutAfter(usize),
    /// A byte now and then.
    Drip(Duration),
    /// Nothing at all, for as long as the server lives.
    Hang,
    /// So many bytes of the body, then nothing.
    HangAfter(usize),
    /// A `Content-Length` that is wrong by so much.
    WrongLength(i64),
    /// The last byte is another one.
    WrongContent,
    /// No `Content-Length`; the end of the connection is the end.
    NoLength,
    /// The whole, whatever range was asked for.
    NoRange,
    /// A part, also if the content is not the one that `If-Range` names.
    NoIfRange,
}

type Handler = dyn Fn(&Asked) -> Answer + Send + Sync;

struct Shared {
    handler: Box<Handler>,
    asked: Mutex<Vec<Asked>>,
    /// Part of the path, what goes wrong there, and how often yet.
    troubles: Mutex<Vec<(String, Trouble, usize)>>,
    stopped: AtomicBool,
}

/// A server on a port of its own, until it is dropped.
pub struct StandIn {
    pub url: String,
    shared: Arc<Shared>,
}

impl StandIn {
    pub fn start(handler: impl Fn(&Asked) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        Self::listen(listener, handler)
    }

    /// On a listener whose address had to be known before.
    pub fn listen(
        listener: TcpListener,
        handler: impl Fn(&Asked) -> Answer + Send + Sync + 'static,
    ) -> Self {
        let url = format!("http://{}", listener.local_addr().unwrap());
        let shared = Arc::new(Shared {
            handler: Box::new(handler),
            asked: Mutex::default(),
            troubles: Mutex::default(),
            stopped: AtomicBool::new(false),
        });
        let serving = Arc::clone(&shared);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if serving.stopped.load(Ordering::SeqCst) {
                    return;
                }
                let (stream, shared) = (stream.unwrap(), Arc::clone(&serving));
                // A client that goes away is no concern of the server.
                std::thread::spawn(move || serve(&stream, &shared).ok());
            }
        });
        Self { url, shared }
    }

    pub fn host(&self) -> &str {
        self.url.strip_prefix("http://").unwrap()
    }

    /// The next `times` requests whose path contains `path` go wrong.
    pub fn trouble(&self, path: &str, trouble: Trouble, times: usize) {
        self.shared.troubles.lock().unwrap().push((path.to_owned(), trouble, times));
    }

    pub fn asked(&self) -> Vec<Asked> {
        self.shared.asked.lock().unwrap().clone()
    }

    /// Requests whose path contains `path`.
    pub fn asked_for(&self, path: &str) -> Vec<Asked> {
        let mut asked = self.asked();
        asked.retain(|asked| asked.path.contains(path));
        asked
    }

    pub fn forget(&self) {
        self.shared.asked.lock().unwrap().clear();
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::SeqCst);
        // Wakes the listener.
        let _ = TcpStream::connect(self.host());
    }
}

fn serve(stream: &TcpStream, shared: &Shared) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    let mut asked = Asked::default();
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let mut words = line.split(' ');
    asked.method = words.next().unwrap_or_default().to_owned();
    asked.path = words.next().unwrap_or_default().to_owned();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 || line.trim().is_empty() {
            break;
        }
        let (name, value) = line.split_once(':').unwrap();
        asked.heads.insert(name.to_lowercase(), value.trim().to_owned());
    }
    if asked.head("expect").is_some() {
        (&*stream).write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
    }
    asked.body = read_body(&mut reader, &asked)?;
    shared.asked.lock().unwrap().push(asked.clone());
    let trouble = {
        let mut troubles = shared.troubles.lock().unwrap();
        let is_due = |(path, _, times): &&mut (String, Trouble, usize)| {
            asked.path.contains(path.as_str()) && *times > 0
        };
        troubles.iter_mut().find(is_due).map(|(_, trouble, times)| {
            *times -= 1;
            trouble.clone()
        })
    };
    let answer = match &trouble {
        Some(Trouble::Answer(answer)) => answer.clone(),
        _ => (shared.handler)(&asked),
    };
    let answer = match answer.status {
        200 => part(&asked, answer, trouble.as_ref()),
        _ => answer,
    };
    send(stream, &asked, answer, trouble, shared)?;
    stream.shutdown(Shutdown::Write)
}

fn read_body(reader: &mut BufReader<&TcpStream>, asked: &Asked) -> std::io::Result<Vec<u8>> {
    let mut body = Vec::new();
    if asked.head("transfer-encoding") == Some("chunked") {
        loop {
            let mut size = String::new();
            reader.read_line(&mut size)?;
            let size = usize::from_str_radix(size.trim(), 16).unwrap_or(0);
            let start = body.len();
            body.resize(start + size, 0);
            reader.read_exact(&mut body[start..])?;
            reader.read_line(&mut String::new())?;
            if size == 0 {
                return Ok(body);
            }
        }
    }
    let length = asked.head("content-length").and_then(|text| text.parse().ok()).unwrap_or(0);
    reader.take(length).read_to_end(&mut body)?;
    Ok(body)
}

/// The part of a body that `Range` and `If-Range` ask for.
fn part(asked: &Asked, mut answer: Answer, trouble: Option<&Trouble>) -> Answer {
    let etag = answer.heads.iter().find(|(name, _)| name == "ETag").map(|(_, etag)| etag.clone());
    if asked.head("if-none-match").is_some() && asked.head("if-none-match") == etag.as_deref() {
        answer.status = 304;
        answer.body.clear();
        return answer;
    }
    let from = asked
        .head("range")
        .and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
    let is_same = asked.head("if-range").is_none_or(|asked| Some(asked) == etag.as_deref())
        || matches!(trouble, Some(Trouble::NoIfRange));
    match from {
        Some(from) if is_same && !matches!(trouble, Some(Trouble::NoRange)) => {
            let whole = answer.body.len();
            if from >= whole {
                return Answer::new(416, "").with("Content-Range", format!("bytes */{whole}"));
            }
            answer.body.drain(..from);
            answer.status = 206;
            answer.with("Content-Range", format!("bytes {from}-{}/{whole}", whole - 1))
        }
        _ => answer,
    }
}

fn send(
    mut stream: &TcpStream,
    asked: &Asked,
    mut answer: Answer,
    trouble: Option<Trouble>,
    shared: &Shared,
) -> std::io::Result<()> {
    let hang = || {
        while !shared.stopped.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    let mut length = answer.body.len() as i64;
    match trouble {
        Some(Trouble::Hang) => {
            hang();
            return Ok(());
        }
        Some(Trouble::WrongLength(by)) => length += by,
        Some(Trouble::WrongContent) => {
            if let Some(last) = answer.body.last_mut() {
                *last ^= 1;
            }
        }
        _ => {}
    }
    let mut head = format!("HTTP/1.1 {} -\r\nConnection: close\r\n", answer.status);
    for (name, value) in &answer.heads {
        head += &format!("{name}: {value}\r\n");
    }
    if !matches!(trouble, Some(Trouble::NoLength)) && answer.status != 304 {
        head += &format!("Content-Length: {length}\r\n");
    }
    stream.write_all(format!("{head}\r\n").as_bytes())?;
    if asked.method == "HEAD" {
        return Ok(());
    }
    let body = &answer.body;
    match trouble {
        Some(Trouble::CutAfter(bytes)) => stream.write_all(&body[..bytes.min(body.len())]),
        Some(Trouble::HangAfter(bytes)) => {
            stream.write_all(&body[..bytes.min(body.len())])?;
            hang();
            Ok(())
        }
        Some(Trouble::Drip(pause)) => {
            for byte in body {
                if shared.stopped.load(Ordering::SeqCst) {
                    break;
                }
                stream.write_all(&[*byte])?;
                std::thread::sleep(pause);
            }
            Ok(())
        }
        _ => stream.write_all(body),
    }
}
