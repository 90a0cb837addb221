//! What runs in the pods of a real cluster, as manifests: nginx and curl from Debian, unmodified, and a shell. The images
//! are made by `cargo xtask test`.

/// A web server on `west` with a Service, and a client on `east`, in the namespace `shop`.
pub fn shop(page: &str) -> String {
    let namespace = "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}";
    [namespace, &server("web", "west", page), &client("client", "east")].join("\n---\n")
}

/// nginx in the namespace `shop`, with a Service: port 80, and port 8080 of the pod. At port 9090 it answers
/// grpc.health.v1.Health/Check, whatever is asked for, with a file: a gRPC message of 2 bytes, `status` (1) SERVING (1).
pub fn server(name: &str, node: &str, page: &str) -> String {
    format!(
        r#"
apiVersion: v1
kind: ConfigMap
metadata: {{name: {name}, namespace: shop}}
binaryData: {{serving: AAAAAAIIAQ==}}
data:
  index.html: |
    {page}
  nginx.conf: |
    daemon off;
    worker_processes 1;
    pid /tmp/pid;
    error_log stderr notice;
    events {{}}
    http {{
      access_log off;
      client_body_temp_path /tmp/body;
      proxy_temp_path /tmp/proxy;
      fastcgi_temp_path /tmp/fastcgi;
      uwsgi_temp_path /tmp/uwsgi;
      scgi_temp_path /tmp/scgi;
      server {{
        listen 8080;
        listen [::]:8080;
        root /web/html;
      }}
      server {{
        listen 9090 http2;
        listen [::]:9090 http2;
        root /web/html;
        default_type application/grpc;
        # Files are not for POST, says nginx; here this one is.
        error_page 405 =200 $uri;
        add_trailer grpc-status 0;
      }}
    }}
---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: shop, labels: {{app: {name}}}}}
spec:
  nodeName: {node}
  terminationGracePeriodSeconds: 1
  containers:
  - name: web
    image: localhost/nginx:test
    command: [/usr/sbin/nginx, -e, stderr, -c, /web/nginx.conf]
    startupProbe: {{tcpSocket: {{port: 8080}}, periodSeconds: 1, failureThreshold: 30}}
    readinessProbe: {{httpGet: {{path: /, port: 8080}}, periodSeconds: 1}}
    livenessProbe: {{grpc: {{port: 9090}}, periodSeconds: 1, failureThreshold: 3}}
    volumeMounts: [{{name: web, mountPath: /web}}]
  volumes:
  - name: web
    configMap:
      name: {name}
      items:
      - {{key: nginx.conf, path: nginx.conf}}
      - {{key: index.html, path: html/index.html}}
      - {{key: serving, path: html/grpc.health.v1.Health/Check}}
---
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: shop}}
spec:
  ipFamilyPolicy: RequireDualStack
  selector: {{app: {name}}}
  ports: [{{port: 80, targetPort: 8080}}]
"#
    )
}

/// A pod in the namespace `shop` from which curl is run, or a shell.
pub fn client(name: &str, node: &str) -> String {
    format!(
        r#"
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: shop, labels: {{app: {name}}}}}
spec:
  nodeName: {node}
  terminationGracePeriodSeconds: 1
  containers:
  - name: client
    image: localhost/curl:test
    command: [sleep, "1000000"]
"#
    )
}

/// A pod on `east` that fetches a page once, first thing.
pub fn caller(name: &str, namespace: &str, url: &str) -> String {
    let command = format!("exec wget -q -O - {url}");
    pod(name, namespace, &command).replace("restartPolicy: Always", "restartPolicy: Never")
}

/// A pod on `east` that does nothing.
pub fn sleeper(name: &str, namespace: &str) -> String {
    pod(name, namespace, "exec sleep 1000000")
}

/// A pod on `east` that runs this in a shell.
pub fn pod(name: &str, namespace: &str, command: &str) -> String {
    format!(
        r#"
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: {namespace}}}
spec:
  nodeName: east
  restartPolicy: Always
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: localhost/busybox:test
    command: [sh, -c, "{command}"]
"#
    )
}
