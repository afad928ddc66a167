{{- define "tunewright.name" -}}
{{- printf "%s" .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "tunewright.labels" -}}
{{ include "tunewright.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end -}}

{{- define "tunewright.selector" -}}
app.kubernetes.io/name: tunewright
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "tunewright.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: { type: RuntimeDefault }
{{- end -}}

{{- define "tunewright.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: { drop: [ALL] }
{{- end -}}

{{- define "tunewright.environment" -}}
- name: TUNEWRIGHT_LOG_FORMAT
  value: json
- name: PGPASSWORD
  valueFrom:
    secretKeyRef:
      name: {{ .Values.database.passwordSecret.name }}
      key: {{ .Values.database.passwordSecret.key }}
{{- with .Values.hub.tokenSecret }}
{{- if .name }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ .name }}
      key: {{ .key }}
{{- end }}
{{- end }}
{{- with .Values.tracing.endpoint }}
- name: OTEL_EXPORTER_OTLP_ENDPOINT
  value: {{ . | quote }}
- name: OTEL_RESOURCE_ATTRIBUTES
  value: k8s.namespace.name={{ $.Release.Namespace }},service.namespace={{ $.Release.Name }}
{{- end }}
{{- end -}}

{{- define "tunewright.mounts" -}}
- name: cache
  mountPath: /var/cache/tunewright
- name: temporary
  mountPath: /tmp
- name: shared-memory
  mountPath: /dev/shm
{{- end -}}

{{- /* Takes root, cacheSize, sharedMemorySize and readOnly. */ -}}
{{- define "tunewright.volumes" -}}
- name: project
  persistentVolumeClaim:
    claimName: {{ .root.Values.project.claim }}
    readOnly: {{ .readOnly }}
- name: cache
  emptyDir: { sizeLimit: {{ .cacheSize }} }
- name: temporary
  emptyDir: {}
- name: shared-memory
  emptyDir: { medium: Memory, sizeLimit: {{ .sharedMemorySize }} }
{{- end -}}
